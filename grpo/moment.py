"""A run as it stood at some moment, as what judges its health looks at it: windows of steps, and evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

WINDOW = 10  # steps that a figure is averaged over: 40 groups at the smallest default batch
LONG_WINDOW = 20  # where the figure is rarer or noisier

Row = Mapping[str, Any]
Sighting = tuple[float, str] | None  # a figure, and what it means in plain words; None where all is well


@dataclass(frozen=True)
class Moment:
    """A run as it stood at some moment."""

    config: Mapping[str, Any]
    steps: Sequence[Row]
    evals: Sequence[Row]  # of validation
    tests: Sequence[Row]
    device: str = ""

    @property
    def evaluated(self) -> bool:
        """Whether the last evaluation is of the policy as it is: what came before it says nothing of later steps."""
        return bool(self.evals and self.steps) and self.evals[-1]["step"] == self.steps[-1]["step"]

    def values(self, name: str, window: int, first: bool = False) -> list[float] | None:
        """A metric over the last (or first) steps; None before there are so many, or where most are null."""
        rows = self.steps[:window] if first else self.steps[-window:]
        known = [row[name] for row in rows if row.get(name) is not None]
        return known if len(rows) == window and 2 * len(known) > window else None

    def mean(self, name: str, window: int = WINDOW, first: bool = False) -> float:
        """The mean of `values`; NaN, which is beyond no threshold, where there are none."""
        values = self.values(name, window, first)
        return fmean(values) if values else float("nan")

    def last(self, name: str) -> float:
        """A metric of the last step; NaN where it is null."""
        value = self.steps[-1].get(name) if self.steps else None
        return float("nan") if value is None else value

    def setting(self, name: str, default: Any = 0) -> Any:
        """A setting of the run."""
        return self.config.get(name, default)


def percent(share: float) -> str:
    """A share as it is said: 42%."""
    return f"{100 * share:.0f}%"
