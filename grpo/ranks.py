"""Several processes that train one policy, as `torchrun --nproc-per-node N train_grpo.py` starts them.

All of them run the same program on the same settings. They share out what can be: the groups of a step, the problems
of an evaluation. What they find is gathered, so that all know the whole step and decide alike; the first one alone
writes and prints. In one process every function here gives back what it is given.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
WHAT_THEN = "what it said last tells why. The last checkpoint is good: the same command goes on from it"
MESSAGE = 2**24  # numbers to be summed at a time
PATIENCE = timedelta(hours=12)  # the others wait while the first one writes, or a reward of one of them is slow


def start(device: torch.device) -> torch.device:
    """Join the other processes of the launch, if there are any; returns the device of this one.

    Raises ValueError where there are more processes than devices, or devices that cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "mps":
        raise ValueError(
            "several processes train on CUDA devices or the CPU, not on mps; start one, or give --device cpu"
        )
    if device.type == "cuda":
        number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= there:
            raise ValueError(f"there are more processes than CUDA devices on this machine ({there}); start {there}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def see_that_it_divides(batch_size: int, shard: bool) -> None:
    """Raise ValueError where the processes cannot share a step evenly, or sharding is asked of one alone."""
    if shard and count() == 1:
        raise ValueError("--shard spreads a model over processes: torchrun --nproc-per-node N train_grpo.py --shard")
    if batch_size % count():
        fitting = f"{max(1, batch_size // count()) * count()}"
        raise ValueError(
            f"{count()} processes cannot share {batch_size} prompts a step evenly; give --batch-size {fitting}"
        )


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return number() == 0


def own(total: int) -> slice:
    """This process's part of `total` things in a row; all have as many, so `total` is a multiple of `count()`."""
    assert total % count() == 0, (total, count())
    size = total // count()
    return slice(number() * size, (number() + 1) * size)


def padded(things: Sequence[Value]) -> Sequence[Value]:
    """The same with the last repeated until all processes have as many."""
    return [*things, *[things[-1]] * (-len(things) % count())]


def gather(value: Value) -> list[Value]:
    """What each process has here, in their order. Tensors of it have to be on the CPU."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def of_first(value: Value) -> Value:
    """What the first process has here: for what is read from a file, which another may be about to replace."""
    return gather(value)[0]


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def smallest(tensor: Tensor) -> Tensor:
    """The least of all processes, elementwise, in place."""
    return _reduced(tensor, dist.ReduceOp.MIN)


def largest(tensor: Tensor) -> Tensor:
    """The largest of all processes, elementwise, in place."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def any_of_all(value: bool) -> bool:
    """Whether it is so for any process."""
    return bool(largest(torch.tensor(int(value))))


def total_of(tensors: Sequence[Tensor]) -> None:
    """The sum of each over all processes, in place: many small ones in one message, which is what takes the time."""
    some: list[Tensor] = []
    for place, tensor in enumerate(tensors, start=1):
        some.append(tensor)
        if place == len(tensors) or sum(map(Tensor.numel, some)) + tensors[place].numel() > MESSAGE:
            flat = total(torch.cat([t.flatten() for t in some]))
            for t, numbers in zip(some, flat.split([t.numel() for t in some]), strict=True):
                t.copy_(numbers.view_as(t))
            some = []


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process does what is inside, then all others do: it may change a file that they then read."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def leave() -> None:
    """Part from the others, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone; that of gloo has no class of its own."""
    return count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def _reduced(tensor: Tensor, how: dist.ReduceOp) -> Tensor:
    if count() > 1:
        dist.all_reduce(tensor, how)
    return tensor
