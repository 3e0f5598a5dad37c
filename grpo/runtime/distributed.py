"""Several processes that train one policy, as `torchrun --nproc-per-node N train_grpo.py` starts them.

All run the same program with the same settings and share out the groups of a step and the problems of an evaluation.
Results are gathered, so that every process knows the whole step and decides alike; rank 0 alone writes and prints. In
a single process every function here returns its argument.

`shard` spreads a model over the processes (torch's FSDP2). Each layer's weights are then fetched from all processes
when it computes and dropped afterwards, so all processes must make the same passes together: in updates, in
evaluations, in the decode loop.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo.runtime.rendezvous import Meeting

Value = TypeVar("Value")
RESUME_HINT = "The last checkpoint is good: the same command continues from it"
BUCKET = 2**24  # numbers in one all-reduce
# the others wait while rank 0 writes, or while one computes a slow reward; for one that is stopped, less
# (`grpo.runtime.rendezvous.Heartbeat`)
TIMEOUT = timedelta(minutes=30)
SAMPLED = 10_000  # weights that are compared


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: of several, each has a CUDA device of its own.

    Raises ValueError if there are more processes than devices, or devices that cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "mps":
        raise ValueError(
            "several processes train on CUDA devices or the CPU, not on mps; start one, or give --device cpu"
        )
    if device.type == "cuda":
        local_rank, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= available:
            raise ValueError(
                f"there are more processes than CUDA devices on this machine ({available}); start {available}"
            )
        return torch.device("cuda", local_rank)
    return device


def connect(meeting: Meeting, device: torch.device) -> None:
    """Open the connections between the processes that have met; `device` is this one's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    size = len(meeting.statements)
    dist.init_process_group(backend, timeout=TIMEOUT, store=meeting.round_store, rank=meeting.rank, world_size=size)
    barrier()  # one that refuses a setting and ends while another still joins would cut it off


def check_batch_divisible(batch_size: int, sharded: bool, option: str = "--batch-size") -> None:
    """Raise ValueError if the processes cannot share a step evenly, or if one process alone is to shard."""
    if sharded and world_size() == 1:
        raise ValueError("--shard spreads a model over processes: torchrun --nproc-per-node N train_grpo.py --shard")
    if batch_size % world_size():
        fitting = f"{max(1, batch_size // world_size()) * world_size()}"
        raise ValueError(
            f"{world_size()} processes cannot share {batch_size} prompts a step evenly; give {option} {fitting}"
        )


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether `error` says that another process is gone, also while it joins; gloo has no class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this is rank 0, the process that writes and prints."""
    return rank() == 0


def local_slice(total: int) -> slice:
    """Return this rank's slice of `total` items, a multiple of the world size."""
    assert total % world_size() == 0, (total, world_size())
    size = total // world_size()
    return slice(rank() * size, (rank() + 1) * size)


def pad_to_world_size(items: Sequence[Value]) -> Sequence[Value]:
    """Return `items` with the last one repeated until every rank gets the same number."""
    return [*items, *[items[-1]] * (-len(items) % world_size())]


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in order. Tensors in them must be on the CPU."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_from_rank0(value: Value) -> Value:
    """Return rank 0's value. Use it for anything read from a file that rank 0 may replace."""
    return gather(value)[0]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Take the elementwise minimum over all ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.MIN)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum over all ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(value: bool) -> bool:
    """Return whether `value` is true on any rank."""
    return bool(all_reduce_max(torch.tensor(int(value))))


def check_alike(what: str, value: Any) -> None:
    """Raise ValueError if a value, which is called `what`, is not the same on all ranks; all must call this."""
    values = gather(value)
    if other := [place for place, found in enumerate(values) if found != values[0]]:
        raise ValueError(
            f"{what} is {values[0]} on process 0 and {values[other[0]]} on process {other[0]}; all must have the same"
        )


@torch.no_grad()
def check_same_model(model: nn.Module) -> None:
    """Raise ValueError unless all ranks loaded the same model: the same precision, shapes and sampled weights."""
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    stride = max(1, sum(p.numel() for p in model.parameters()) // SAMPLED) | 1  # odd, so that it meets every column
    for name, p in model.named_parameters():
        some = p.flatten()[::stride].contiguous().cpu()
        digest.update(f"{name} {tuple(p.shape)} {some.dtype}".encode() + bytes(some.view(torch.uint8).tolist()))
    check_alike("the precision of passes", str(getattr(model, "compute_dtype", torch.float32)))
    check_alike("the model", f"one with the hash {digest.hexdigest()[:12]}")


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others: rank 0 may change a file that they then read."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread a model, which every rank holds on the CPU, over the ranks' devices, in place, layer by layer.

    With several machines, each has the whole model, spread over its own devices: weights travel within a machine,
    and only gradients between them (FSDP2's hybrid sharding).
    """
    mesh = _mesh(device)
    # passes are in the model's precision, gradients are summed in float32
    policy = MixedPrecisionPolicy(getattr(model, "compute_dtype", None), torch.float32)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # its parameters are shards between passes
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _mesh(device: torch.device) -> DeviceMesh:
    """Return machines by processes of one, if each has the same number of several; else all processes in a row."""
    local = gather(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    if len(set(local)) > 1 or not 1 < local[0] < world_size():
        return init_device_mesh(device.type, (world_size(),))
    shape = (world_size() // local[0], local[0])
    return init_device_mesh(device.type, shape, mesh_dim_names=("machine", "process"))


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has spread this model."""
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, of which each rank may hold a shard; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Spread a whole tensor, which every rank holds, as `example` is spread."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def gather_to_rank0(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return named tensors whole, collected one by one; of several ranks only rank 0 keeps them, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        complete = full_tensor(tensor.detach())
        if is_main_process():
            found[name] = complete.cpu() if world_size() > 1 else complete
    return found


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all ranks. Their losses have the denominators of the whole step, so this is its gradient.

    FSDP has averaged those of sharded parameters already, over all ranks, with one machine or several.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    if isinstance(gradients[0], DTensor):
        torch._foreach_mul_(gradients, float(world_size()))
    else:
        _all_reduce_buckets(gradients)


def _all_reduce_buckets(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over all ranks, in place, many in one message: the number of messages is what takes time."""
    bucket: list[Tensor] = []
    for place, tensor in enumerate(tensors, start=1):
        bucket.append(tensor)
        if place == len(tensors) or sum(map(Tensor.numel, bucket)) + tensors[place].numel() > BUCKET:
            flat = all_reduce_sum(torch.cat([t.flatten() for t in bucket]))
            for t, numbers in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(numbers.view_as(t))
            bucket = []


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor
