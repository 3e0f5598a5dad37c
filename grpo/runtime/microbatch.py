"""The number of rows in one pass through the model, which is halved when memory runs out."""

from collections.abc import Callable
from typing import TypeVar

from grpo.runtime.console import say
from grpo.runtime.device import empty_caches, is_out_of_memory

Result = TypeVar("Result")


def split_microbatches(rows: int, group: int, rows_per_pass: int) -> list[slice]:
    """Cut group-major rows into slices of at most `rows_per_pass`: whole groups, or parts of a larger group.

    >>> split_microbatches(8, 4, 8), split_microbatches(8, 4, 7)
    ([slice(0, 8, None)], [slice(0, 4, None), slice(4, 8, None)])
    >>> split_microbatches(4, 4, 3)
    [slice(0, 3, None), slice(3, 4, None)]
    """
    size = rows_per_pass // group * group
    if size:
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [
        slice(start, min(start + rows_per_pass, first + group))
        for first in range(0, rows, group)
        for start in range(first, first + group, rows_per_pass)
    ]


class AdaptiveMicrobatch:
    """Hold the number of rows per pass for one kind of work, such as sampling. Halve it when memory runs out."""

    def __init__(self, work: str, rows: int, group: int, collective: bool = False) -> None:
        """Begin with `rows` rows, in groups of `group`. If `collective`, the run ends if memory runs out."""
        self.work, self.rows, self.group, self.collective = work, rows, group, collective

    def run(self, work: Callable[[int], Result]) -> Result:
        """Return `work(rows_per_pass)`. Whenever memory runs out, halve the rows and start the work again.

        A group is split only if a whole one does not fit. Raises ValueError if a single row does not fit.
        """
        while True:
            try:
                return work(self.rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # This is outside the except clause, in which the error would keep the tensors of the failed pass alive.
            self._halve()
            empty_caches()

    def _halve(self) -> None:
        if self.collective:
            raise ValueError(
                f"memory ran out in {self.work}, which all processes do together. The last checkpoint is intact: the "
                "same command continues from it; give a smaller --micro-batch-size, or use more processes"
            )
        if self.rows == 1:
            raise ValueError(
                f"memory ran out in {self.work}, with one completion at a time. The last checkpoint is intact: "
                "the same command continues from it with more memory, or on --device cpu; or start a new run with a "
                "smaller --model or --max-new-tokens"
            )
        groups = self.rows // self.group
        self.rows = groups // 2 * self.group if groups > 1 else min(self.rows, self.group) // 2
        say(f"Memory ran out in {self.work}: from now on a pass has {self.rows} rows. The result stays the same.")
