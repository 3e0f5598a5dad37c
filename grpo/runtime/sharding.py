"""A model spread over several processes by torch's FSDP2 (`--shard`).

Each layer's weights are fetched from all processes when it computes and dropped afterwards, so all processes must
make the same passes together: in updates, in evaluations, in the decode loop.
"""

import os
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def own_machine_size(processes: int) -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def shard(model: nn.Module, device: torch.device, machine_sizes: Sequence[int]) -> None:
    """Spread a model, which every process holds on the CPU, over their devices, in place, layer by layer.

    `machine_sizes` has for each process how many there are on its machine. With several machines, each has the whole
    model, spread over its own devices: weights travel within a machine, and only gradients between them (FSDP2's
    hybrid sharding).
    """
    mesh = _mesh(device, machine_sizes)
    # passes are in the model's precision, gradients are summed in float32
    policy = MixedPrecisionPolicy(getattr(model, "compute_dtype", None), torch.float32)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # its parameters are shards between passes
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.run_as_forward = MethodType(_run, model)
    register_fsdp_forward_method(model, "run_as_forward")


def run_as_forward(model: nn.Module, work: Callable[[], Value]) -> Value:
    """Return `work()`, run as a forward pass of the model: a sharded one fetches its own weights for it."""
    return model.run_as_forward(work) if is_sharded(model) else work()


def _run(self: nn.Module, work: Callable[[], Value]) -> Value:
    return work()


def _mesh(device: torch.device, machine_sizes: Sequence[int]) -> DeviceMesh:
    """Return machines by processes of one, if each has the same number of several; else all processes in a row."""
    processes, on_one_machine = len(machine_sizes), machine_sizes[0]
    if len(set(machine_sizes)) > 1 or not 1 < on_one_machine < processes:
        return init_device_mesh(device.type, (processes,))
    shape = (processes // on_one_machine, on_one_machine)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machine", "process"))


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has spread this model."""
    return isinstance(model, FSDPModule)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Spread a whole tensor, which every process holds, as `example` is spread."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
