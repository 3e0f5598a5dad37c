"""Series for the figures: a metric over the steps, smoothed, and several runs as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import CHANGEABLE_ON_RESUME, TrainConfig, with_new_names

SMOOTHED_FROM = 10  # steps; below that, every step is a marker
# Settings that a run may change when it continues, but that make its curve another one: its numbers or its length.
DECIDES_A_CURVE = ("precision", "num_iterations", "patience", "target_accuracy")
Record = Mapping[str, Any]


def column(record: Record, name: str) -> np.ndarray:
    """Return one metric of every step; NaN where it is null or missing."""
    values = [step.get(name) for step in record["steps"]]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def window_for(steps: int) -> int:
    """Return the steps that smoothing looks at: a fifteenth of the run, at least 11, an odd number."""
    return max(11, steps // 15) | 1


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Fit a line around every step (tricube weights) and read it at the step; NaN where the value itself is.

    At the ends of a rising curve a moving average is cut short and drawn inwards; a fitted line is not (Cleveland,
    1979, "Robust locally weighted regression", without the robust part). The result stays in the range of the values,
    so a share never leaves 0 to 1.
    """
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    half = window // 2
    if not half or not known.any():
        return np.where(known, array, np.nan)
    away = np.arange(-half, half + 1) / (half + 1)
    weight = (1 - np.abs(away) ** 3) ** 3
    y, n = (np.pad(a, half) for a in (np.where(known, array, 0.0), known.astype(float)))
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
    """Return the phases of a step's time; what is inside another phase (`time/reward/exact`) is not one."""
    names = dict.fromkeys(name for step in record["steps"] for name in step if name.startswith("time/"))
    return [name for name in (n.removeprefix("time/") for n in names) if "/" not in name and name != "total"]


def evaluations(record: Record, split: str) -> list[Mapping[str, Any]]:
    """Return the evaluations on one split."""
    return [entry for entry in record["evals"] if entry.get("split") == split]


def findings(record: Record) -> list[Mapping[str, Any]]:
    """Return the findings of a run by step, without damaged ones."""
    found = record.get("findings")
    found = found if isinstance(found, list) else []
    sound = [f for f in found if isinstance(f, dict) and isinstance(f.get("text"), str)]
    return sorted(sound, key=lambda f: f["step"] if isinstance(f.get("step"), int) else float("inf"))


@dataclass
class Group:
    """Runs that are drawn as one curve: the same label, or the same settings and each another seed."""

    label: str
    records: list[Record] = field(default_factory=list)

    @property
    def seeds(self) -> list[Any]:
        """Return the seeds of its runs, in order."""
        return [record["config"].get("seed", "?") for record in self.records]

    @property
    def steps(self) -> int:
        """Return the last step that any of its runs has reached."""
        return max((record["steps"][-1]["step"] for record in self.records if record["steps"]), default=0)


@dataclass
class Spread:
    """Several runs at each of some steps: mean, smallest and largest, and how many runs there were."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: np.ndarray


def over_runs(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> Spread:
    """Join runs of (steps, values) of different lengths; a run without a value at a step is left out there."""
    steps = np.unique(np.concatenate([s for s, _ in series])) if series else np.array([])
    table = np.full((max(1, len(series)), len(steps)), np.nan)
    for row, (own, values) in zip(table, series, strict=False):
        row[np.searchsorted(steps, own)] = values
    runs = np.isfinite(table).sum(axis=0)
    total = np.where(np.isfinite(table), table, 0.0).sum(axis=0)
    mean = np.divide(total, runs, out=np.full(len(steps), np.nan), where=runs > 0)
    low = np.where(runs > 0, np.where(np.isfinite(table), table, np.inf).min(axis=0), np.nan)
    high = np.where(runs > 0, np.where(np.isfinite(table), table, -np.inf).max(axis=0), np.nan)
    return Spread(steps, mean, low, high, runs)


def group_runs(paths: Sequence[Path], records: Sequence[Record], labels: Sequence[str]) -> list[Group]:
    """Group runs by label; without labels, those that differ in their seed only.

    Settings that change nothing in a curve, such as the output folder, are not compared. A run alone is labelled by
    its path and the settings that differ between the groups. `labels` is empty, or as long as `paths`.
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
    """Return the settings that make the curves of two runs differ, but for the seed; precision as "auto" chose it."""
    config = {**TrainConfig().to_dict(), **with_new_names(record["config"])}  # an older run lacks what came later
    environment = record.get("environment")
    if isinstance(environment, Mapping):  # a damaged or older record may have none
        config["precision"] = environment.get("precision", config["precision"])
    left_out = {"seed", *CHANGEABLE_ON_RESUME} - set(DECIDES_A_CURVE)
    return {name: value for name, value in config.items() if name not in left_out}


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each of several settings by where it differs from the others; empty if they are all the same."""
    names = dict.fromkeys(name for one in settings for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in settings}) > 1]
    return [", ".join(f"{name} {one.get(name, '?')}" for name in differing) for one in settings]
