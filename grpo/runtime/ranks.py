"""The processes that train one policy together, and what they say to each other.

All run the same program with the same settings. They share out the groups of a step and the problems of an
evaluation, and gather the results, so that every process knows the whole step and decides alike; rank 0 alone writes
and prints. `ONE` is a single process, the default everywhere: there, every method returns its argument.

`grpo/launch/torchrun.py` makes the ranks of a launch with several processes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Value = TypeVar("Value")
BUCKET_NUMBERS = 2**24  # numbers in one all-reduce of gradients
COMPARED_WEIGHTS = 10_000  # of each model, to see whether all ranks loaded the same one


@dataclass(frozen=True)
class Ranks:
    """The processes of a launch, `size` of them, and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # the place among those of this machine

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process: of several, each has a CUDA device of its own.

        Raises ValueError if there are more processes than devices, or devices that cannot be joined.
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
        """Raise ValueError if the processes cannot share a step evenly, or if one process alone is to shard."""
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
        """Return this rank's slice of `total` items, a multiple of the number of ranks."""
        assert total % self.size == 0, (total, self.size)
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def padded(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return `items` with the last one repeated until every rank gets the same number."""
        return [*items, *[items[-1]] * (-len(items) % self.size)]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in order. Tensors in them must be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Value) -> Value:
        """Return rank 0's value. Use it for anything read from a file that rank 0 may replace."""
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
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others: rank 0 may change a file that they then read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def check_alike(self, what: str, value: Any) -> None:
        """Raise ValueError if a value, which is called `what`, is not the same on all ranks; all must call this."""
        values = self.gather(value)
        others = [rank for rank, found in enumerate(values) if found != values[0]]
        if others:
            raise ValueError(
                f"{what} is {values[0]} on process 0 and {values[others[0]]} on process {others[0]}; "
                "all must have the same"
            )

    @torch.no_grad()
    def check_same_model(self, model: nn.Module) -> None:
        """Raise ValueError unless all ranks loaded the same model: precision, shapes and a sample of the weights."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        stride = max(1, sum(p.numel() for p in model.parameters()) // COMPARED_WEIGHTS) | 1  # odd: meets every column
        for name, p in model.named_parameters():
            sample = p.flatten()[::stride].contiguous().cpu()
            digest.update(f"{name} {tuple(p.shape)} {sample.dtype}".encode())
            digest.update(bytes(sample.view(torch.uint8).tolist()))
        self.check_alike("the precision of passes", str(getattr(model, "compute_dtype", torch.float32)))
        self.check_alike("the model", f"one with the hash {digest.hexdigest()[:12]}")

    def collect(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return named tensors whole, collected one by one; of several ranks only rank 0 keeps them, on the CPU."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            complete = full_tensor(tensor.detach())
            if self.is_main:
                found[name] = complete.cpu() if self.size > 1 else complete
        return found

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all ranks.

        Their losses have the denominators of the whole step, so the sum is the gradient of the step. FSDP has
        averaged the gradients of sharded parameters already, over all ranks, with one machine or several.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        if isinstance(gradients[0], DTensor):
            torch._foreach_mul_(gradients, float(self.size))
        else:
            self._sum_in_buckets(gradients)

    def _sum_in_buckets(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, many in one message: each message costs time."""
        bucket: list[Tensor] = []
        for place, tensor in enumerate(tensors, start=1):
            bucket.append(tensor)
            is_last = place == len(tensors)
            if is_last or sum(map(Tensor.numel, bucket)) + tensors[place].numel() > BUCKET_NUMBERS:
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
    """Return whether `error` says that another process is gone, also while it joins; gloo has no class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, of which each process may hold a shard; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
