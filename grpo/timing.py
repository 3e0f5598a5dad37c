"""Where the time of a run went: seconds by phase, from its metrics. Pure."""

from collections.abc import Mapping
from typing import Any

PHASES = {"sample": "sampling", "reference": "reference", "update": "update"}


def seconds_by_phase(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of sampling, each reward function, reference, update, evaluation and saving; they do not overlap."""
    steps, evals = record["steps"], record["evals"]
    phases = {name: _sum(steps, f"time/{phase}") for phase, name in PHASES.items()}
    rewards = sorted({name for row in steps for name in row if name.startswith("time/reward/")})
    phases |= {f"reward {name.removeprefix('time/reward/')}": _sum(steps, name) for name in rewards}
    return phases | {"evaluation": _sum(evals, "time/evaluate"), "saving": _sum(steps, "time/save")}


def tokens_per_second(record: Mapping[str, Any]) -> float:
    """Prompt and completion tokens of the rollouts, for each second of the steps."""
    return _sum(record["steps"], "tokens") / max(1e-9, _sum(record["steps"], "time/total"))


def _sum(rows: list[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows)
