"""The choice of the device and of its arithmetic."""

import pytest
import torch

from grpo.runtime.device import autocast, choose_device

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="not known"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device auto"):
            choose_device("cuda")


def test_passes_on_the_cpu_are_float32():
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
