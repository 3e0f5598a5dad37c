"""The precision of passes through a model: float32 or bfloat16.

Weights, optimizer, log-softmax and loss are always float32. A bfloat16 pass computes everything else in bfloat16.
torch.autocast is not used, because it computes only matrix products in bfloat16: it would cast the inputs of seven
products in each layer, and hold all these copies until the backward pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from grpo.runtime.device import TRAITS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_precision(model: nn.Module, name: str, device: torch.device) -> None:
    """Set the precision in which `in_precision` runs a model's passes; "auto" is the faster one on `device`.

    "auto" is bfloat16 on GPUs of CUDA capability 8 and up, and on CPUs that multiply bfloat16 in hardware. Raises
    ValueError if the name is unknown, or if the device computes wrongly in this precision. Both can happen with a
    name from a model's folder.
    """
    if name == "auto":
        name = "bfloat16" if TRAITS[device.type].multiplies_bfloat16(device) else "float32"
    if name not in list(DTYPES):  # a list, because a name from a file may be unhashable
        raise ValueError(f"--precision is {name!r}; it must be auto, float32 or bfloat16")
    if name == "bfloat16" and not TRAITS[device.type].has_bfloat16:
        raise ValueError(
            f"bfloat16 cannot be used on {device.type}, where attention would see later tokens (pytorch's issue "
            "#195910); give --device cpu, or train with --precision float32"
        )
    model.compute_dtype = DTYPES[name]


def precision(model: nn.Module) -> str:
    """Return the name of the precision of a model's passes."""
    return str(getattr(model, "compute_dtype", torch.float32)).removeprefix("torch.")


def in_precision(model: nn.Module) -> AbstractContextManager[None]:
    """Run the model's forward and backward passes within the block in the model's precision."""
    if precision(model) == "float32" or isinstance(model, FSDPModule):  # a sharded model casts its shards itself
        return nullcontext()
    return _cast_weights(model, model.compute_dtype)


@contextmanager
def _cast_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace each float32 weight by a cast to `dtype` in the block. Gradients go to the float32 weight."""
    weights = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.dtype == torch.float32
    ]
    casts = {weight: weight.to(dtype) for _, _, weight in weights}  # a weight that two modules share is cast once
    try:
        for parameters, name, weight in weights:
            parameters[name] = casts[weight]
        yield
    finally:
        for parameters, name, weight in weights:
            parameters[name] = weight


@torch.no_grad()
def lower_weights(model: nn.Module) -> None:
    """Cast the weights of a model that is never trained to the precision of its passes, in place."""
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(model, "compute_dtype", weight.dtype))
