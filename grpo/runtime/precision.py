"""The precision of passes through a model: float32, or bfloat16 by autocast.

Weights, optimizer, log-softmax and loss are float32 either way.

What did not work: a trial product in both precisions, the faster one to be taken. After it the first pass in float32
was off by 2e-3 nats in 4 of 10 launches on a CPU with AMX, torch 2.13, and in none of 17 without it; then a model was
held to be unable to share its prompts.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_precision(model: nn.Module, name: str, device: torch.device) -> None:
    """Let `autocast` run a model's passes on `device` in this precision; "auto" takes the faster one.

    That is bfloat16 on CUDA cards of capability 8 and up, and on CPUs that multiply it in hardware. Raises ValueError
    for another name: a model's folder may have any.
    """
    if name == "auto":
        name = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if name not in list(DTYPES):  # it may be of any type
        raise ValueError(f"precision is {name!r}; it must be auto, float32 or bfloat16")
    model.autocast_dtype = DTYPES[name]


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


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() is of no use here: it counts emulation
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16: AMX or AVX512-BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
