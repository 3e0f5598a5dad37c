"""The processes that train one policy together, and the communication between them.

All processes run the same program with the same settings. They share out the groups of a step and the problems of an
evaluation, and gather the results. So every process knows the whole step and makes the same decisions. Only rank 0
writes and prints. `ONE`, a single process, is the default everywhere; it communicates with nobody.

`grpo/launch/torchrun.py` makes the ranks of a launch with several processes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Value = TypeVar("Value")
BUCKET_NUMBERS = 2**24  # One all-reduce sums at most so many numbers of the gradients.
COMPARED_WEIGHTS = 10_000  # So many weights are compared, to see whether all ranks loaded the same model.


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the `size` processes of a launch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # the place among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    @property
    def script(self) -> list[str]:
        """Return the words that start a launch of a run with as many processes."""
        if self.size == 1:
            return ["python", "train_grpo.py"]
        return ["torchrun", "--nproc-per-node", str(self.size), "train_grpo.py"]

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process: each of several processes has another CUDA device.

        Raises ValueError if there are more processes than devices, or if the devices cannot work together.
        """
        if self.size == 1:
            return device
        if device.type == "mps":
            raise ValueError(
                "several processes train on CUDA devices or the CPU, not on mps; start one, or give --device cpu"
            )
        if device.type == "cuda":
            available = torch.cuda.device_count()
            if self.local_rank >= available:
                raise ValueError(
                    f"there are more processes than CUDA devices on this machine ({available}); start {available}"
                )
            return torch.device("cuda", self.local_rank)
        return device

    def check_divisible(self, batch_size: int, sharded: bool, option: str = "--batch-size") -> None:
        """Raise ValueError if the processes cannot share a step evenly, or if a single process gets --shard."""
        if sharded and self.size == 1:
            raise ValueError(
                "--shard spreads a model over processes: torchrun --nproc-per-node N train_grpo.py --shard"
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
        """Return `items` with the last one repeated until every rank gets the same number."""
        return [*items, *[items[-1]] * (-len(items) % self.size)]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, by rank. Tensors in the values must be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Value) -> Value:
        """Return rank 0's value, to be used for what is read from a file that rank 0 may replace."""
        return self.gather(value)[0]

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 alone; return its value, or raise its ValueError, on all ranks."""
        if self.size == 1:
            return work()
        value, message = None, None
        if self.is_main:
            try:
                value = work()
            except ValueError as error:
                message = str(error)
        value, message = self.from_main((value, message))
        if message is not None:
            raise ValueError(message)
        return value

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def min(self, tensor: Tensor) -> Tensor:
        """Take the elementwise minimum over all ranks, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MIN)

    def max(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum over all ranks, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on any rank."""
        return value if self.size == 1 else bool(self.max(torch.tensor(int(value))))

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the other ranks, which may read what rank 0 has written."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def check_alike(self, what: str, value: Any) -> None:
        """Raise ValueError, with the name `what`, if a value differs between ranks; all ranks must call this."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what} is {values[0]} on process 0 and {other} on process {rank}; all must have the same"
                )

    @torch.no_grad()
    def check_same_model(self, model: nn.Module) -> None:
        """Raise ValueError unless all ranks loaded the same model: precision, shapes and a sample of the weights."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        stride = (
            max(1, sum(p.numel() for p in model.parameters()) // COMPARED_WEIGHTS) | 1
        )  # odd: reaches all columns
        for name, p in model.named_parameters():
            sample = p.flatten()[::stride].contiguous().cpu()
            digest.update(f"{name} {tuple(p.shape)} {sample.dtype}".encode())
            digest.update(bytes(sample.view(torch.uint8).tolist()))
        self.check_alike("the precision of passes", str(getattr(model, "compute_dtype", torch.float32)))
        self.check_alike("the model", f"one with the hash {digest.hexdigest()[:12]}")

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return whole tensors by name, put together from shards; of several ranks, only rank 0 gets them (CPU)."""
        collected: dict[str, Tensor] = {}
        for name, tensor in tensors:
            complete = full_tensor(tensor.detach())
            if self.is_main:
                collected[name] = complete.cpu() if self.size > 1 else complete
        return collected

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all ranks, in place.

        The losses have the denominators of the whole step, so the sum is the gradient of the step. The gradients of
        sharded parameters are already averaged over all ranks, by FSDP.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        if isinstance(gradients[0], DTensor):
            torch._foreach_mul_(gradients, float(self.size))
        else:
            self._sum_in_buckets(gradients)

    def _sum_in_buckets(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place; a message has many tensors, because each message costs time."""
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors, start=1):
            bucket.append(tensor)
            is_last = number == len(tensors)
            if is_last or sum(map(Tensor.numel, bucket)) + tensors[number].numel() > BUCKET_NUMBERS:
                flat = self.sum(torch.cat([t.flatten() for t in bucket]))
                for t, numbers in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(numbers.view_as(t))
                bucket = []

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, operation)
        return tensor


ONE = Ranks()


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether `error` says that another process has ended; for gloo, only the message says so."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor, put together from its shards if it is sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
