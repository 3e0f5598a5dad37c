"""What the metrics of a run say about its health, in plain words: what is seen, what it means, what to change.

`findings` reads the record of `grpo_metrics.json` and nothing else, so that a file says the same as the run did. A
finding is a figure beyond a threshold, over a window of steps where a single batch would be noise. A new finding is
one function in `groups.py`, `learning.py` or `stability.py` and its name in the list at the end of that file.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo.diagnostics import groups, learning, stability
from grpo.diagnostics.snapshot import CheckResult, RunSnapshot

SHOW_EXAMPLES = ("reward_hacking",)  # findings that a few completions illustrate
CHECKS: dict[str, Callable[[RunSnapshot], CheckResult]] = {
    check.__name__: check for check in (*groups.CHECKS, *learning.CHECKS, *stability.CHECKS)
}

# left out where it is not known what is right
OF_ACCURACY = ("unsolved_category", "collapsed", "reward_hacking", "format_only", "overfitting", "past_peak")
OF_ACCURACY += ("falling_category",)


@dataclass(frozen=True)
class Finding:
    """A thing that is wrong with a run, at the step where it first shows."""

    name: str
    step: int
    figure: float
    text: str


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """Return all findings of a run, each at the first step where it holds."""
    found: dict[str, Finding] = {}
    for now in _snapshots(record):
        found |= {finding.name: finding for finding in _check(now, found)}
    return list(found.values())


def new_findings(record: Mapping[str, Any], known: Collection[str]) -> list[Finding]:
    """Return the findings at the end of the record whose names are not in `known`; called after each step."""
    return _check(_end(record), known)


def _check(now: RunSnapshot, known: Collection[str]) -> list[Finding]:
    step = now.steps[-1]["step"] if now.steps else 0
    # where the mean reward chooses the best policy, it is not known what is right
    passed = known if not any("reward" in e for e in now.evals) else {*known, *OF_ACCURACY}
    seen = [(name, check(now)) for name, check in CHECKS.items() if name not in passed]
    return [Finding(name, step, float(result[0]), result[1]) for name, result in seen if result]


def _end(record: Mapping[str, Any]) -> RunSnapshot:
    evals, where = record["evals"], record.get("environment") or {}
    # earlier versions did not write the precision: they took bfloat16 on some cards, and never on a CPU
    precision = where.get("precision") or ("float32" if where.get("device") == "cpu" else "bfloat16")
    validation, tests = ([e for e in evals if e.get("split") == split] for split in ("validation", "test"))
    return RunSnapshot(record["config"], record["steps"], validation, tests, precision, record.get("outlook"))


def _snapshots(record: Mapping[str, Any]) -> Iterator[RunSnapshot]:
    """Yield the run after each step and evaluation. Tests but the first come at the end, of an earlier policy."""
    end = _end(record)
    yield replace(end, steps=[], evals=[], tests=[])
    for n, row in enumerate(end.steps, 1):
        before = [e for e in end.evals if e["step"] < row["step"]]
        yield replace(end, steps=end.steps[:n], evals=before, tests=end.tests[:1])
        after = [e for e in end.evals if e["step"] <= row["step"]]
        if len(after) > len(before):
            yield replace(end, steps=end.steps[:n], evals=after, tests=end.tests[:1])
    yield end
