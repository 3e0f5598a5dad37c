"""How much goes through the model at once, and what happens when that is more than the memory holds."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo import ranks
from grpo.console import say

Result = TypeVar("Result")
# what a model raises whose cache cannot do what a shortcut asks of it
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)
SAME = 1e-3  # nats; in float32 a shortcut gives the same to 1e-6 where a model can take it at all
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")  # MPS, cuBLAS, the CPU


def passes(rows: int, group: int, limit: int) -> list[slice]:
    """Cut group-major rows into passes of at most `limit`: whole groups, or parts of one where one is too much.

    >>> passes(8, 4, 8), passes(8, 4, 7)
    ([slice(0, 8, None)], [slice(0, 4, None), slice(4, 8, None)])
    >>> passes(4, 4, 3)
    [slice(0, 3, None), slice(3, 4, None)]
    """
    size = limit // group * group
    if size:
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [
        slice(start, min(start + limit, first + group))
        for first in range(0, rows, group)
        for start in range(first, first + group, limit)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; CUDA has a class for it, the other devices a text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def is_refusal(error: Exception) -> bool:
    """Whether an error says that a model cannot take a shortcut, rather than that memory ran out on it."""
    return isinstance(error, REFUSALS) and not is_out_of_memory(error)


def gives(shortcut: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a shortcut gives the expected log-probabilities of a model; where the model refuses it, it does not."""
    try:
        found = shortcut()
    except Exception as error:
        if not is_refusal(error):
            raise
        return False
    return bool((found - expected).abs().max() < SAME)


@contextmanager
def done_together(work: str) -> Iterator[None]:
    """What several processes do at the same time: where memory runs out in it, one of them cannot do it again.

    Raises ValueError then.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.count() == 1 or not is_out_of_memory(error):
            raise
        raise ValueError(
            f"memory ran out in {work}. The last checkpoint is good: the same command goes on from it with --shard"
        ) from None


class PassLimit:
    """How many rows one kind of work takes through the model at once; halved for good when memory runs out."""

    def __init__(self, work: str, rows: int, group: int, together: bool = False) -> None:
        """`together`: several processes make every pass at the same time, so none can halve its own."""
        self.work, self.rows, self.group, self.together = work, rows, group, together

    def fit(self, run: Callable[..., Result], *args: Any, **more: Any) -> Result:
        """`run(*args, **more, limit=rows)`, from its beginning with half as many rows while memory runs out.

        Whole groups are kept together as long as one fits. Raises ValueError where a single row does not.
        """
        while True:
            try:
                return run(*args, **more, limit=self.rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # after the except clause: the error holds on to the frames, and so to the tensors, of what failed
            self._halve()
            _free_unused()

    def _halve(self) -> None:
        if self.together:
            raise ValueError(
                f"memory ran out in {self.work}, which all processes do together. The last checkpoint is good: the "
                "same command goes on from it with a smaller --micro-batch-size, or with more processes"
            )
        if self.rows == 1:
            raise ValueError(
                f"memory ran out in {self.work}, with one completion at a time. The last checkpoint is good: "
                "the same command goes on from it with more memory, or on --device cpu; or start anew with a smaller "
                "--model or --max-new-tokens"
            )
        groups = self.rows // self.group
        self.rows = groups // 2 * self.group if groups > 1 else min(self.rows, self.group) // 2
        say(f"Memory ran out in {self.work}: from now on {self.rows} at a time. What is computed stays the same.")


def keep_what_is_freed() -> None:
    """Have the memory of freed tensors stay with the process, for the next ones. For glibc; others are left alone.

    By itself glibc gives it back to the system, which hands it out again page by page: on 2 cores updates took 5% to
    25% longer for it, at no less memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: on a CUDA device there, elsewhere in all; None if nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _free_unused() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
