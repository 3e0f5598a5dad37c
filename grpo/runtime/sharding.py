"""A model spread over several processes by torch's FSDP2 (`--shard`).

Before a layer computes, its weights are fetched from all processes; afterwards they are dropped. So all processes
must run the same passes together: in updates, in evaluations, and for each sampled token.
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

from grpo.runtime.ranks import Ranks

Value = TypeVar("Value")


def shard(model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Spread a model, which every process holds on the CPU, over the devices of the processes, in place.

    If several machines have the same number of processes, at least two each, each machine holds the whole model,
    spread over its devices. Then only gradients are sent between machines (FSDP2's hybrid sharding). All ranks must
    call this.
    """
    mesh = _mesh(device, ranks.gather(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))))
    # Passes are in the model's precision; gradients are summed in float32.
    policy = MixedPrecisionPolicy(getattr(model, "compute_dtype", None), torch.float32)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # drop fetched weights after a pass
    model.run_as_forward = MethodType(_run, model)
    register_fsdp_forward_method(model, "run_as_forward")


def run_as_forward(model: nn.Module, work: Callable[[], Value]) -> Value:
    """Run `work` as a forward pass of the model, so that a sharded model fetches its weights; return the result."""
    return model.run_as_forward(work) if is_sharded(model) else work()


def _run(self: nn.Module, work: Callable[[], Value]) -> Value:
    return work()


def _mesh(device: torch.device, machine_sizes: Sequence[int]) -> DeviceMesh:
    """Return the mesh of all processes; `machine_sizes` has, for each process, the number on its machine.

    The mesh is machines × processes if several machines have the same number of processes, at least 2; else one row.
    """
    processes = len(machine_sizes)
    on_one_machine = machine_sizes[0]
    if len(set(machine_sizes)) > 1 or not 1 < on_one_machine < processes:
        return init_device_mesh(device.type, (processes,))
    shape = (processes // on_one_machine, on_one_machine)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machine", "process"))


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has spread this model."""
    return isinstance(model, FSDPModule)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a tensor, which every process holds completely, sharded in the same way as `example`."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
