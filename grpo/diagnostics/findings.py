"""What the metrics of a run say about its health: what was measured, what it means, what to change.

`findings` reads the record of `grpo_metrics.json` and nothing else, so a file gives the same findings as the run did.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo.diagnostics import groups, learning, stability
from grpo.diagnostics.snapshot import CheckResult, RunSnapshot

CHECKS: dict[str, Callable[[RunSnapshot], CheckResult]] = {
    name: check
    for module in (groups, learning, stability)
    for name, check in vars(module).items()
    if getattr(check, "__module__", "") == module.__name__ and not name.startswith("_")
}
# These findings need to know which answers are right. They are left out where the mean reward chooses the policy.
NEED_ACCURACY = {"unsolved_category", "collapsed", "reward_hacking", "format_only", "overfitting", "past_peak"}
NEED_ACCURACY |= {"falling_category"}
SHOW_EXAMPLES = ("reward_hacking",)  # These findings quote wrong completions that have high rewards.


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run, at the step where it first shows."""

    name: str
    step: int
    figure: float
    text: str


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """Return all findings of a run, each at the first step where it holds."""
    by_name: dict[str, Finding] = {}
    for run in _snapshots(record):
        by_name |= {finding.name: finding for finding in _check(run, by_name)}
    return list(by_name.values())


def new_findings(record: Mapping[str, Any], earlier: Collection[str]) -> list[Finding]:
    """Return the findings at the end of a record whose names are not in `earlier`; called after each step."""
    return _check(_end(record), earlier)


def _check(run: RunSnapshot, earlier: Collection[str]) -> list[Finding]:
    step = run.steps[-1]["step"] if run.steps else 0
    left_out = {*earlier, *NEED_ACCURACY} if any("reward" in e for e in run.evals) else earlier
    results = [(name, check(run)) for name, check in CHECKS.items() if name not in left_out]
    return [Finding(name, step, float(result[0]), result[1]) for name, result in results if result]


def _end(record: Mapping[str, Any]) -> RunSnapshot:
    """Return the snapshot of a whole record."""
    environment = record.get("environment") or {}
    validations = [e for e in record["evals"] if e.get("split") == "validation"]
    tests = [e for e in record["evals"] if e.get("split") == "test"]
    # Earlier versions did not write the precision. They computed in float32 on a CPU, and in bfloat16 on some cards.
    precision = environment.get("precision") or ("float32" if environment.get("device") == "cpu" else "bfloat16")
    return RunSnapshot(record["config"], record["steps"], validations, tests, precision, record.get("outlook"))


def _snapshots(record: Mapping[str, Any]) -> Iterator[RunSnapshot]:
    """Yield the run after each step and each evaluation, and last with the test of the saved policy."""
    end = _end(record)
    yield replace(end, steps=[], evals=[], tests=[])
    for n, row in enumerate(end.steps, 1):
        before = [e for e in end.evals if e["step"] < row["step"]]
        yield replace(end, steps=end.steps[:n], evals=before, tests=end.tests[:1])
        after = [e for e in end.evals if e["step"] <= row["step"]]
        if len(after) > len(before):
            yield replace(end, steps=end.steps[:n], evals=after, tests=end.tests[:1])
    yield end
