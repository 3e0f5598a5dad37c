"""Prepare the series of the figures: a metric over the steps, smoothed, or several runs combined into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import CHANGEABLE_ON_RESUME, TrainConfig, with_new_names

SMOOTHED_FROM = 10  # A run with fewer steps is drawn without smoothing, with a marker for each step.
# These settings may change when a run continues, but they change the values or the length of the run's curve.
CHANGES_A_CURVE = ("precision", "num_iterations", "patience", "target_accuracy")
Record = Mapping[str, Any]


def column(record: Record, name: str) -> np.ndarray:
    """Return one metric at every step, (steps,); NaN where it is null or missing."""
    values = [step.get(name) for step in record["steps"]]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def window_for(steps: int) -> int:
    """Return the width of the smoothing window in steps: 1/15 of the run, but at least 11, and an odd number."""
    return max(11, steps // 15) | 1


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Return the values smoothed by a line that is fitted to the steps around each step; NaN where a value is NaN.

    The weights are tricube (Cleveland, 1979, "Robust locally weighted regression", without the robust part). A fitted
    line follows a rising curve to its ends, where a moving average would bend. The result stays in the range of the
    values, so a share stays between 0 and 1.
    """
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    half = window // 2
    if not half or not known.any():
        return np.where(known, array, np.nan)
    away = np.arange(-half, half + 1) / (half + 1)
    weight = (1 - np.abs(away) ** 3) ** 3
    y = np.pad(np.where(known, array, 0.0), half)
    n = np.pad(known.astype(float), half)
    s0, s1, s2 = (np.correlate(n, weight * away**k, "valid") for k in range(3))
    t0, t1 = (np.correlate(y, weight * away**k, "valid") for k in range(2))
    spread = s0 * s2 - s1**2
    fitted = np.divide(t0, s0, out=np.full_like(array, np.nan), where=known)
    np.divide(s2 * t0 - s1 * t1, spread, out=fitted, where=known & (spread > 1e-9))
    return np.clip(fitted, array[known].min(), array[known].max())


def reward_parts(record: Record) -> list[str]:
    """Return the names of the reward's parts, in the order in which they first appear."""
    names = dict.fromkeys(name for step in record["steps"] for name in step if name.startswith("reward/"))
    return [name.removeprefix("reward/") for name in names]


def phases(record: Record) -> list[str]:
    """Return the phases of a step's time, such as "sample"; parts of a phase (`time/reward/exact`) are left out."""
    names = dict.fromkeys(name for step in record["steps"] for name in step if name.startswith("time/"))
    return [name.removeprefix("time/") for name in names if name.count("/") == 1 and name != "time/total"]


def findings(record: Record) -> list[Mapping[str, Any]]:
    """Return the findings of a run in the order of their steps."""
    return sorted(record.get("findings", []), key=lambda finding: finding["step"])


@dataclass
class Group:
    """Hold runs that are drawn as one curve: runs with the same label, or with the same settings except the seed."""

    label: str
    records: list[Record] = field(default_factory=list)

    @property
    def seeds(self) -> list[Any]:
        """Return the seeds of the runs, in the order of the runs."""
        return [record["config"].get("seed", "?") for record in self.records]

    @property
    def steps(self) -> int:
        """Return the last step that any of the runs has reached."""
        return max((record["steps"][-1]["step"] for record in self.records if record["steps"]), default=0)


@dataclass
class Spread:
    """Hold arrays (steps,): mean and range of several runs at each step, NaN at steps where no run has a value."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: np.ndarray  # how many runs have a value


def over_runs(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> Spread:
    """Return the mean and range, at each step, of the runs with a value there; each run is a pair (steps, values)."""
    steps = np.unique(np.concatenate([s for s, _ in series])) if series else np.array([])
    table = np.full((max(1, len(series)), len(steps)), np.nan)
    for row, (run_steps, values) in zip(table, series, strict=False):
        row[np.searchsorted(steps, run_steps)] = values
    runs = np.isfinite(table).sum(axis=0)
    total = np.where(np.isfinite(table), table, 0.0).sum(axis=0)
    mean = np.divide(total, runs, out=np.full(len(steps), np.nan), where=runs > 0)
    low = np.where(runs > 0, np.where(np.isfinite(table), table, np.inf).min(axis=0), np.nan)
    high = np.where(runs > 0, np.where(np.isfinite(table), table, -np.inf).max(axis=0), np.nan)
    return Spread(steps, mean, low, high, runs)


def group_runs(paths: Sequence[Path], records: Sequence[Record], labels: Sequence[str]) -> list[Group]:
    """Group runs by label; without labels, group runs that have different seeds and otherwise the same settings.

    Settings that do not change a curve, such as the output folder, are not compared. Without labels, a single run is
    labelled by its path and the settings that differ between groups. `labels` is empty, or as long as `paths`.
    """
    if labels:
        groups = {label: Group(label) for label in labels}
        for label, record in zip(labels, records, strict=True):
            groups[label].records.append(record)
        return list(groups.values())
    by_settings: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_settings.setdefault(repr(sorted(_settings(record).items())), []).append(i)
    names = _names([_settings(records[rows[0]]) for rows in by_settings.values()])
    groups = []
    for rows, name in zip(by_settings.values(), names, strict=True):
        group = Group(name, [records[i] for i in rows])
        if len(rows) > 1 and len({repr(seed) for seed in group.seeds}) == len(rows):
            group.label = group.label or str(records[rows[0]]["config"].get("model", "?"))
            groups.append(group)
        else:
            groups += [Group(", ".join(filter(None, (str(paths[i]), name))), [records[i]]) for i in rows]
    return groups


def _settings(record: Record) -> dict[str, Any]:
    """Return the settings, other than the seed, that change a curve; `precision` is what the run used, never auto."""
    config = {**TrainConfig().to_dict(), **with_new_names(record["config"])}  # an older record lacks newer settings
    environment = record.get("environment")
    if isinstance(environment, Mapping):  # a damaged or older record may have no environment
        config["precision"] = environment.get("precision", config["precision"])
    left_out = {"seed", *CHANGEABLE_ON_RESUME} - set(CHANGES_A_CURVE)
    return {name: value for name, value in config.items() if name not in left_out}


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each group, made of the settings in which groups differ; "" if all settings are equal."""
    names = dict.fromkeys(name for group in settings for name in group)
    differing = [name for name in names if len({repr(group.get(name)) for group in settings}) > 1]
    return [", ".join(f"{name} {group.get(name, '?')}" for name in differing) for group in settings]
