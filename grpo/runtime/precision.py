"""The precision of passes through a model: float32, or bfloat16.

Weights, optimizer, log-softmax and loss are float32 either way.

Passes are in bfloat16 throughout, between products too. Under torch.autocast, as before, products alone are: that
casts the input of each of seven products a layer, and holds all casts for the backward pass.

Not tried again: a trial product in both precisions, the faster one to be taken. After it the first pass in float32
was off by 2e-3 nats in 4 of 10 launches; that was the first call of the vector functions (`begin_vector_math`), not
the trial. The CPU's instructions say enough.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_precision(model: nn.Module, name: str, device: torch.device) -> None:
    """Let `in_precision` run a model's passes on `device` in this precision; "auto" takes the faster one.

    That is bfloat16 on CUDA cards of capability 8 and up, and on CPUs that multiply it in hardware. Raises ValueError
    for another name: a model's folder may have any.
    """
    if name == "auto":
        name = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if name not in list(DTYPES):  # it may be of any type
        raise ValueError(f"--precision is {name!r}; it must be auto, float32 or bfloat16")
    model.compute_dtype = DTYPES[name]


def precision(model: nn.Module) -> str:
    """Return the precision of a model's passes."""
    return str(getattr(model, "compute_dtype", torch.float32)).removeprefix("torch.")


def in_precision(model: nn.Module) -> AbstractContextManager[None]:
    """Run passes of a model in the precision that it was loaded with, the backward pass too if there is one.

    A sharded model casts its shards itself.
    """
    if precision(model) == "float32" or isinstance(model, FSDPModule):
        return nullcontext()
    return _cast_weights(model, model.compute_dtype)


@contextmanager
def _cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace each float32 weight by a cast of itself, so that all that is computed from it has this type.

    The gradient goes to the weight, in float32.
    """
    weights = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.dtype == torch.float32
    ]
    casts = {weight: weight.to(dtype) for _, _, weight in weights}  # one cast of a weight that has two places
    try:
        for parameters, name, weight in weights:
            parameters[name] = casts[weight]
        yield
    finally:
        for parameters, name, weight in weights:
            parameters[name] = weight


@torch.no_grad()
def lower_weights(model: nn.Module) -> None:
    """Hold the weights of a model that is not trained in the precision of its passes."""
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(model, "compute_dtype", weight.dtype))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() is of no use here: it counts emulation
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16: AMX or AVX512-BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
