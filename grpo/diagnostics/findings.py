"""Check the metrics of a run for problems. A finding says what was measured, what it means and what to change.

`findings` reads the record of `grpo_metrics.json` and nothing else, so a file gives the same findings as the run did.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo.diagnostics import groups, learning, stability
from grpo.diagnostics.snapshot import CheckResult, RunSnapshot
from grpo.record.schema import evaluations

CHECKS: dict[str, Callable[[RunSnapshot], CheckResult]] = {
    name: check
    for module in (groups, learning, stability)
    for name, check in vars(module).items()
    if getattr(check, "__module__", "") == module.__name__ and not name.startswith("_")
}
# These findings need to know which answers are right. They are left out if the mean reward chooses the policy.
NEED_ACCURACY = {"unsolved_category", "collapsed", "reward_hacking", "format_only", "overfitting", "past_peak"}
NEED_ACCURACY |= {"falling_category"}
SHOW_EXAMPLES = ("reward_hacking",)  # These findings quote wrong completions that have high rewards.


@dataclass(frozen=True)
class Finding:
    """A problem of a run: the step at which it was first found, the number that shows it, and a text about it."""

    name: str
    step: int
    figure: float
    text: str


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """Return all findings of a run, each with the first step at which its check reports it."""
    by_name: dict[str, Finding] = {}
    for run in _snapshots(record):
        by_name |= {finding.name: finding for finding in _check(run, by_name)}
    return list(by_name.values())


def new_findings(record: Mapping[str, Any], earlier: Collection[str]) -> list[Finding]:
    """Check a record as it is after its last step; return the findings whose names are not in `earlier`."""
    return _check(_end(record), earlier)


def _check(run: RunSnapshot, earlier: Collection[str]) -> list[Finding]:
    step = run.steps[-1]["step"] if run.steps else 0
    left_out = {*earlier, *NEED_ACCURACY} if any("reward" in e for e in run.evals) else earlier
    results = [(name, check(run)) for name, check in CHECKS.items() if name not in left_out]
    return [Finding(name, step, float(result[0]), result[1]) for name, result in results if result]


def _end(record: Mapping[str, Any]) -> RunSnapshot:
    """Return the snapshot of a whole record."""
    environment = record.get("environment") or {}
    validations, tests = evaluations(record, "validation"), evaluations(record, "test")
    # Earlier versions did not record the precision. They used float32 on a CPU and bfloat16 on some GPUs. Assume
    # bfloat16 off the CPU, because its limits are looser.
    precision = environment.get("precision") or ("float32" if environment.get("device") == "cpu" else "bfloat16")
    outlook = record.get("outlook")
    before_sft = record.get("before_sft")
    return RunSnapshot(record["config"], record["steps"], validations, tests, precision, outlook, before_sft)


def _snapshots(record: Mapping[str, Any]) -> Iterator[RunSnapshot]:
    """Yield snapshots of a run: before the first step, after each step and each evaluation, and at the end."""
    end = _end(record)
    yield replace(end, steps=[], evals=[], tests=[])
    yield replace(end, steps=[], evals=[e for e in end.evals if e["step"] == 0], tests=end.tests[:1])
    for n, row in enumerate(end.steps, 1):
        before = [e for e in end.evals if e["step"] < row["step"]]
        yield replace(end, steps=end.steps[:n], evals=before, tests=end.tests[:1])
        after = [e for e in end.evals if e["step"] <= row["step"]]
        if len(after) > len(before):
            yield replace(end, steps=end.steps[:n], evals=after, tests=end.tests[:1])
    yield end
