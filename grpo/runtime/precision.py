"""The precision of passes through a model: float32, or bfloat16 by autocast.

Weights, optimizer, log-softmax and loss are float32 either way.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

TRIED_ROWS, TRIALS = 512, 5  # of a trial product; the fastest of so many counts
WORTH_IT = 1.5  # times faster: less would be lost on casts


def set_precision(model: nn.Module, name: str, device: torch.device) -> None:
    """Let `autocast` run a model's passes on `device` in this precision; "auto" takes the faster one.

    That is bfloat16 on CUDA cards of capability 8 and up, and on CPUs that multiply it in hardware and do so faster
    in a trial on the shape of the model's largest hidden layer.
    """
    if name == "auto":
        name = "bfloat16" if _prefers_bfloat16(model, device) else "float32"
    model.autocast_dtype = getattr(torch, name)


def precision(model: nn.Module) -> str:
    """Return the precision of a model's passes."""
    return str(getattr(model, "autocast_dtype", torch.float32)).removeprefix("torch.")


def autocast(model: nn.Module) -> AbstractContextManager:
    """Run passes of a model in the precision that it was loaded with. A cast of a weight is kept until the end."""
    if precision(model) == "float32":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, model.autocast_dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which `x` takes part in a product of matrices here: that of autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _prefers_bfloat16(model: nn.Module, device: torch.device) -> bool:
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() is of no use here: it counts emulation
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not cpu_multiplies_bfloat16():
        return False
    shapes = [layer.weight.shape for layer in model.modules() if isinstance(layer, nn.Linear)]
    # the largest is the output layer, whose product waits for the memory in either precision
    layers = sorted(set(shapes), key=lambda shape: shape.numel())[:-1] or shapes
    return bool(layers) and _faster_in_bfloat16(*layers[-1])


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16: AMX or AVX512-BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


@cache
def _faster_in_bfloat16(outputs: int, inputs: int) -> bool:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(TRIED_ROWS, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
        times = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] >= WORTH_IT * seconds[torch.bfloat16]
