"""A run at some moment, as the checks of its health see it: windows of steps, and evaluations.

A window is as many steps as hold some groups, so that a figure is as sure in a run of 1 × 2 as in one of 16 × 16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot
from statistics import fmean
from typing import Any

from grpo.evaluation.intervals import wilson

GROUPS, STEPS = 40, 10  # that a window holds at least
LONG = 2  # times as many, for rarer or noisier figures

Row = Mapping[str, Any]
CheckResult = tuple[float, str] | None  # a figure, and what it means in plain words; None if all is well


@dataclass(frozen=True)
class RunSnapshot:
    """The record of a run up to some moment."""

    config: Mapping[str, Any]
    steps: Sequence[Row]
    evals: Sequence[Row]  # of validation
    tests: Sequence[Row]
    precision: str = "float32"  # of passes
    outlook: Row | None = None  # what a look before the first step found

    @cached_property
    def categories(self) -> dict[str, list[Row]]:
        """Return the validation evaluations of each category of problems that is in all of them, with their steps."""
        tables = [e.get("categories", {}) for e in self.evals]
        names = [name for name in (tables[-1] if tables else {}) if all(name in table for table in tables)]
        return {name: [{**e["categories"][name], "step": e["step"]} for e in self.evals] for name in names}

    @property
    def batch(self) -> int:
        """Return the groups of a step."""
        return max(1, int(self.setting("batch_size", 4)))

    @cached_property
    def window(self) -> int:
        """Return the steps that a figure is averaged over."""
        return max(STEPS, -(-GROUPS // self.batch))

    @property
    def long_window(self) -> int:
        """Return the steps that a rarer or noisier figure is averaged over."""
        return LONG * self.window

    @property
    def evaluated(self) -> bool:
        """Return whether the last evaluation is of the current policy: an earlier one says nothing of later steps."""
        return bool(self.evals and self.steps) and self.evals[-1]["step"] == self.steps[-1]["step"]

    def values(self, name: str, window: int | None = None, first: bool = False) -> list[float] | None:
        """Return a metric over the last (or first) steps; None before there are so many, or if most are null."""
        window = window or self.window
        rows = self.steps[:window] if first else self.steps[-window:]
        known = [row[name] for row in rows if row.get(name) is not None]
        return known if len(rows) == window and 2 * len(known) > window else None

    def mean(self, name: str, window: int | None = None, first: bool = False) -> float:
        """Return the mean of `values`; NaN, which is beyond no threshold, if there are none."""
        values = self.values(name, window, first)
        return fmean(values) if values else float("nan")

    def at_least(self, name: str, threshold: float, window: int | None = None, first: bool = False) -> bool:
        """Return whether a share of groups or completions is at least `threshold`, beyond the noise of the groups."""
        return lower_bound(self.mean(name, window, first), self.groups(window)) >= threshold

    def groups(self, window: int | None = None) -> int:
        """Return the number of groups in a window."""
        return (window or self.window) * self.batch

    def last(self, name: str) -> float:
        """Return a metric of the last step; NaN if it is null."""
        value = self.steps[-1].get(name) if self.steps else None
        return float("nan") if value is None else value

    def blocks(self, name: str, length: int) -> list[float]:
        """Return the means of a metric over blocks of steps one after the other; NaN for a block without values."""
        rows = [self.steps[i : i + length] for i in range(0, len(self.steps) - length + 1, length)]
        known = [[row[name] for row in block if row.get(name) is not None] for block in rows]
        return [fmean(values) if values else float("nan") for values in known]

    def setting(self, name: str, default: Any = 0) -> Any:
        """Return a setting of the run."""
        return self.config.get(name, default)


def lower_bound(share: float, n: int) -> float:
    """Return the lower end of the 95% interval of a share of n; NaN for NaN."""
    return wilson(share, n)[0]


def upper_bound(share: float, n: int) -> float:
    """Return the upper end of the 95% interval of a share of n; NaN for NaN."""
    return wilson(share, n)[1]


def noise(*evaluations: Row) -> float:
    """Return the half-width of the 95% interval of a difference of evaluations."""
    return hypot(*(e["ci_high"] - e["ci_low"] for e in evaluations)) / 2


def percent(share: float) -> str:
    """Format a share: 42%."""
    return f"{100 * share:.0f}%"
