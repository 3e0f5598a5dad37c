"""Weights, gradients and optimizer spread over the processes, for models that do not fit one device: torch's FSDP2.

Each layer's weights are fetched from all processes when it computes, and dropped again. So all make every pass
together, and as many of them: in the update, in an evaluation, in the decode loop.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo import ranks


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a model that each process has on the CPU over their devices, in place, layer by layer."""
    mesh = init_device_mesh(device.type, (ranks.count(),))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that its parameters are parts between passes


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread this model."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part, complete; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def for_the_first(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors complete, one by one; of several processes only the first keeps them, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        complete = whole(tensor.detach())
        if ranks.is_first():
            found[name] = complete.cpu() if ranks.count() > 1 else complete
    return found


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A complete tensor, which all processes have, spread as `example` is."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes: with the denominators of the whole step, the sum is the step's gradient.

    FSDP has averaged those of sharded parameters already.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if ranks.count() == 1 or not gradients:
        return
    if isinstance(gradients[0], DTensor):
        torch._foreach_mul_(gradients, float(ranks.count()))
    else:
        ranks.total_of(gradients)
