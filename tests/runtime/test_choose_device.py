"""The choice of the device."""

import pytest
import torch

from grpo.runtime.device import choose_device

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"^--device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^--device cuda is not available"):
            choose_device("cuda")
