"""The choice of the device."""

import os
from dataclasses import replace

import pytest
import torch

from grpo.runtime import device as devices
from grpo.runtime.device import TRAITS, choose_device

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"^--device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^--device cuda is not available"):
            choose_device("cuda")


EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("system", "release", "before", "after"),
    [
        ("linux", "6.8.0-generic", {}, EXPANDABLE),
        ("linux", "6.8.0-generic", {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ("linux", "6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", {}, {}),
        ("win32", "11", {}, {}),
    ],
)
def test_cuda_may_extend_its_blocks_of_memory_unless_the_user_says_otherwise(
    system, release, before, after, monkeypatch
):
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    monkeypatch.setitem(TRAITS, "cuda", replace(TRAITS["cuda"], is_available=lambda: True))
    monkeypatch.setattr(os, "environ", dict(before))
    choose_device("cpu")
    assert os.environ == before
    assert choose_device("cuda").type == "cuda"
    assert os.environ == after
