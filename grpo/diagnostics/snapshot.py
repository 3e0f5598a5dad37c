"""A run at one moment, as the checks see it: windows of steps, and evaluations.

Every public function of `groups.py`, `learning.py` and `stability.py` is a check, named like its finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot
from statistics import fmean
from typing import Any

from grpo.evaluation.intervals import wilson

WINDOW_MIN_GROUPS = 40  # A window has at least this many groups, so that its means are certain enough.
WINDOW_MIN_STEPS = 10
LONG_WINDOW = 2  # Rare or noisy figures are means over this number of windows.
NEARLY_ALL = 0.9  # From this share of groups or completions on, messages say "nearly all".
HARDLY_ANY = 0.02  # Up to this share of completions, 1 of 50, messages say "hardly any".

Row = Mapping[str, Any]
CheckResult = tuple[float, str] | None  # the figure and the text of the finding; None if there is no finding


@dataclass(frozen=True)
class RunSnapshot:
    """The record of a run up to one moment."""

    config: Mapping[str, Any]
    steps: Sequence[Row]
    evals: Sequence[Row]  # on validation problems
    tests: Sequence[Row]  # on test problems
    precision: str  # the precision of forward and backward passes
    outlook: Row | None  # what was measured on completions before the first step
    before_sft: Row | None  # the evaluation on test problems before the supervised steps

    @cached_property
    def categories(self) -> dict[str, list[Row]]:
        """Return, for each category that every evaluation has, its validation entries with their steps."""
        tables = [e.get("categories", {}) for e in self.evals]
        names = [name for name in (tables[-1] if tables else {}) if all(name in table for table in tables)]
        return {name: [{**e["categories"][name], "step": e["step"]} for e in self.evals] for name in names}

    @property
    def batch(self) -> int:
        """Return the number of groups in a step."""
        return max(1, int(self.config.get("batch_size", 4)))

    @cached_property
    def window(self) -> int:
        """Return the number of steps over which a figure is averaged."""
        return max(WINDOW_MIN_STEPS, -(-WINDOW_MIN_GROUPS // self.batch))

    @property
    def long_window(self) -> int:
        """Return the number of steps over which a rare or noisy figure is averaged."""
        return LONG_WINDOW * self.window

    @property
    def evaluated(self) -> bool:
        """Return whether the last evaluation was made after the last step, so that it measured the current policy."""
        return bool(self.evals and self.steps) and self.evals[-1]["step"] == self.steps[-1]["step"]

    @property
    def has_constant_reward(self) -> bool:
        """Return whether all completions of the window have the same reward, although only some of them are right."""
        rewards = self.values("reward_mean")
        tied = self.values("tied_groups_fraction")
        if not rewards or not tied or min(tied) < 1 or min(rewards) < max(rewards):
            return False
        return HARDLY_ANY < self.mean("accuracy") < 1 - HARDLY_ANY

    def values(self, name: str, window: int | None = None, first: bool = False) -> list[float]:
        """Return the values of a metric in the last (or first) `window` steps, without nulls.

        The list is empty if there are fewer steps, or if at least half of the values are null.
        """
        window = window or self.window
        rows = self.steps[:window] if first else self.steps[-window:]
        values = [row[name] for row in rows if row.get(name) is not None]
        return values if len(rows) == window and 2 * len(values) > window else []

    def mean(self, name: str, window: int | None = None, first: bool = False) -> float:
        """Return the mean of `values`; if there are none, NaN, which is neither above nor below any threshold."""
        values = self.values(name, window, first)
        return fmean(values) if values else float("nan")

    def at_least(self, name: str, threshold: float, window: int | None = None, first: bool = False) -> bool:
        """Return whether the 95% interval of a mean share lies at or above `threshold`; n is the number of groups."""
        return lower_bound(self.mean(name, window, first), self.groups(window)) >= threshold

    def groups(self, window: int | None = None) -> int:
        """Return the number of groups in a window."""
        return (window or self.window) * self.batch

    def earlier_blocks(self, name: str, length: int) -> list[float]:
        """Return the means of a metric over blocks of `length` steps, without the last block and empty blocks."""
        blocks = [self.steps[i : i + length] for i in range(0, len(self.steps) - length + 1, length)][:-1]
        values = [[row[name] for row in block if row.get(name) is not None] for block in blocks]
        return [fmean(block) for block in values if block]


def lower_bound(share: float, n: int) -> float:
    """Return the lower end of the 95% interval of a share of n cases; NaN for a share of NaN."""
    return wilson(share, n)[0]


def upper_bound(share: float, n: int) -> float:
    """Return the upper end of the 95% interval of a share of n cases; NaN for a share of NaN."""
    return wilson(share, n)[1]


def noise(first: Row, second: Row) -> float:
    """Return the half-width of the 95% interval of the difference between two evaluations' accuracies."""
    return hypot(first["ci_high"] - first["ci_low"], second["ci_high"] - second["ci_low"]) / 2


def percent(share: float) -> str:
    """Format a share from 0 to 1 as a percentage, such as 42%."""
    return f"{100 * share:.0f}%"
