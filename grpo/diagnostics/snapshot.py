"""A run at some moment, as the checks of its health see it: windows of steps, and evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

WINDOW = 10  # steps that a figure is averaged over: 40 groups at the smallest default batch
LONG_WINDOW = 20  # for rarer or noisier figures

Row = Mapping[str, Any]
CheckResult = tuple[float, str] | None  # a figure, and what it means in plain words; None if all is well


@dataclass(frozen=True)
class RunSnapshot:
    """The record of a run up to some moment."""

    config: Mapping[str, Any]
    steps: Sequence[Row]
    evals: Sequence[Row]  # of validation
    tests: Sequence[Row]
    device: str = ""

    @property
    def evaluated(self) -> bool:
        """Return whether the last evaluation is of the current policy: an earlier one says nothing of later steps."""
        return bool(self.evals and self.steps) and self.evals[-1]["step"] == self.steps[-1]["step"]

    def values(self, name: str, window: int, first: bool = False) -> list[float] | None:
        """Return a metric over the last (or first) steps; None before there are so many, or if most are null."""
        rows = self.steps[:window] if first else self.steps[-window:]
        known = [row[name] for row in rows if row.get(name) is not None]
        return known if len(rows) == window and 2 * len(known) > window else None

    def mean(self, name: str, window: int = WINDOW, first: bool = False) -> float:
        """Return the mean of `values`; NaN, which is beyond no threshold, if there are none."""
        values = self.values(name, window, first)
        return fmean(values) if values else float("nan")

    def last(self, name: str) -> float:
        """Return a metric of the last step; NaN if it is null."""
        value = self.steps[-1].get(name) if self.steps else None
        return float("nan") if value is None else value

    def setting(self, name: str, default: Any = 0) -> Any:
        """Return a setting of the run."""
        return self.config.get(name, default)


def percent(share: float) -> str:
    """Format a share: 42%."""
    return f"{100 * share:.0f}%"
