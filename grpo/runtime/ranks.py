"""The processes that train one policy together, and the communication between them.

All processes run the same program with the same settings. They divide the groups of a step and the problems of an
evaluation among them, and gather the results. So every process knows the whole step and makes the same decisions.
Only rank 0 writes and prints. The default everywhere is `ONE`, a process that trains alone; its methods show what a
run without torchrun does. `ConnectedRanks` has the same methods for several processes that communicate;
`grpo/launch/torchrun.py` creates it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.runtime.device import check_usable, is_out_of_memory

Value = TypeVar("Value")
BUCKET_NUMBERS = 2**24  # One all-reduce sums at most this many numbers, unless a single gradient has more.
COMPARED_WEIGHTS = 10_000  # About this many weights are compared, to check that all ranks loaded the same model.


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among the `size` processes of a launch; by default, it is the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # the number of this process among those on its machine

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    @property
    def script(self) -> list[str]:
        """Return the first words of a command that starts a run with the same number of processes."""
        if self.size == 1:
            return ["python", "train_grpo.py"]
        return ["torchrun", "--nproc-per-node", str(self.size), "train_grpo.py"]

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process, which was asked to use `device`."""
        return device

    def check_divisible(self, batch_size: int, sharded: bool, option: str = "--batch-size") -> None:
        """Raise ValueError if the processes cannot share a step evenly, or if --shard has only one process."""
        if sharded and self.size == 1:
            raise ValueError(
                "--shard needs at least two processes; start it with "
                "torchrun --nproc-per-node N train_grpo.py --shard"
            )
        if batch_size % self.size:
            fitting = max(1, batch_size // self.size) * self.size
            raise ValueError(
                f"{self.size} processes cannot share {batch_size} prompts a step evenly; give {option} {fitting}"
            )

    def own_slice(self, total: int) -> slice:
        """Return this rank's slice of `total` items; `total` must be a multiple of the number of ranks."""
        assert total % self.size == 0, (total, self.size)
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def padded(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return `items`, with the last item repeated until every rank gets the same number of items."""
        return [*items, *[items[-1]] * (-len(items) % self.size)]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, by rank. Tensors in the values must be on the CPU."""
        return [value]

    def from_main(self, value: Value) -> Value:
        """Return the value of rank 0 on all ranks. Use it for values read from a file that rank 0 may replace."""
        return self.gather(value)[0]

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 alone; return its value, or raise its ValueError or interruption, on all ranks."""
        return work()

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> Tensor:
        """Take the elementwise "sum", "min" or "max" of a tensor over all ranks, in place."""
        return tensor

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on any rank."""
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all ranks, in place."""

    def end_if_out_of_memory(self, work: str) -> AbstractContextManager[None]:
        """With several ranks, raise ValueError if memory runs out in a block that no rank can repeat alone."""
        return nullcontext()

    def barrier(self) -> None:
        """Wait until all ranks have called this."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the other ranks, which may read what rank 0 has written."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def check_alike(self, what: str, value: Any) -> None:
        """Raise a ValueError that names `what`, if a value differs between ranks. All ranks must call this."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what} is {values[0]} on process 0 and {other} on process {rank}; they must be equal"
                )

    def check_same_model(self, model: nn.Module) -> None:
        """Raise ValueError unless all ranks loaded the same model: precision, shapes and a sample of the weights."""

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors by name, put together from shards. With several ranks, only rank 0 gets them, on the CPU."""
        return {name: full_tensor(tensor.detach()) for name, tensor in tensors}


class ConnectedRanks(Ranks):
    """The ranks of a launch with several processes, which torch.distributed has connected."""

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process. On CUDA, each process of a machine has its own device.

        Raises ValueError if there are more processes than devices, if the devices cannot work together, or if torch
        cannot use the device.
        """
        if device.type == "mps":
            raise ValueError("several processes cannot train on mps; start a single process, or give --device cpu")
        if device.type == "cuda":
            available = torch.cuda.device_count()
            if self.local_rank >= available:
                raise ValueError(
                    f"this machine has more processes than CUDA devices; start at most {available} processes on it"
                )
            device = torch.device("cuda", self.local_rank)
            check_usable(device)
        return device

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, by rank. Tensors in the values must be on the CPU."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0; send its value, its interruption, or the message of its ValueError to all ranks."""
        value, message, interruption = None, None, None
        if self.is_main:
            try:
                value = work()
            except ValueError as error:
                message = str(error)
            except KeyboardInterrupt as error:
                interruption = error
        value, message, interruption = self.from_main((value, message, interruption))
        if interruption is not None:
            raise interruption
        if message is not None:
            raise ValueError(message)
        return value

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> Tensor:
        """Take the elementwise "sum", "min" or "max" of a tensor over all ranks, in place."""
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation.upper()))
        return tensor

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on any rank."""
        return bool(self.all_reduce(torch.tensor(int(value)), "max"))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all ranks, in place.

        Losses are divided by the denominators of the whole step, so the sum is the gradient of the step. FSDP has
        already averaged the gradients of sharded parameters over all ranks, so they are multiplied by the number of
        ranks.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and isinstance(gradients[0], DTensor):
            torch._foreach_mul_(gradients, float(self.size))
        else:
            self._sum_in_buckets(gradients)

    def _sum_in_buckets(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place. Each message holds many tensors, because messages cost time."""
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors, start=1):
            bucket.append(tensor)
            is_last = number == len(tensors)
            if is_last or sum(map(Tensor.numel, bucket)) + tensors[number].numel() > BUCKET_NUMBERS:
                flat = self.all_reduce(torch.cat([t.flatten() for t in bucket]))
                for t, numbers in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(numbers.view_as(t))
                bucket = []

    @contextmanager
    def end_if_out_of_memory(self, work: str) -> Iterator[None]:
        """Raise ValueError if memory runs out in a block that no rank can repeat alone."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"memory ran out in {work}. The last checkpoint is intact: to continue, add --shard to the same "
                "command"
            ) from None

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        dist.barrier()

    @torch.no_grad()
    def check_same_model(self, model: nn.Module) -> None:
        """Raise ValueError unless all ranks loaded the same model: precision, shapes and a sample of the weights."""
        digest = hashlib.sha256()
        samples = sample_of(model.parameters(), COMPARED_WEIGHTS)
        for (name, p), sample in zip(model.named_parameters(), samples, strict=True):
            # A copy, because `contiguous` keeps the stride of a sample of one number, and then `view` fails.
            sample = sample.cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{name} {tuple(p.shape)} {sample.dtype}".encode())
            digest.update(bytes(sample.view(torch.uint8).tolist()))
        self.check_alike("the precision of passes", str(getattr(model, "compute_dtype", torch.float32)))
        self.check_alike("the model", f"one with the hash {digest.hexdigest()[:12]}")

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors by name, put together from shards, on rank 0 and on the CPU; on other ranks nothing."""
        collected: dict[str, Tensor] = {}
        for name, tensor in tensors:
            complete = full_tensor(tensor.detach())  # all ranks send their shards
            if self.is_main:
                collected[name] = complete.cpu()
        return collected


ONE = Ranks()


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether `error` means that another process has ended. gloo's errors are recognised by their message."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def sample_of(weights: Iterable[Tensor], size: int) -> list[Tensor]:
    """Return about `size` evenly spaced numbers from `weights`, always the same ones, as one tensor per weight."""
    weights = list(weights)
    stride = max(1, sum(w.numel() for w in weights) // size) | 1  # odd, to sample all columns of a matrix
    return [w.flatten()[::stride] for w in weights]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor: if it is sharded, put its shards together. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
