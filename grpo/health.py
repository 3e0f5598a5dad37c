"""What the metrics of a run say of its health, in plain words: what is seen, what it means, what to change.

`findings` reads the record of `grpo_metrics.json` and nothing else, so that a file says the same as the run did. A
finding is a figure beyond a threshold, over a window of steps wherever a single batch is noise.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo import illnesses, symptoms
from grpo.moment import Moment, Sighting

SHOW_EXAMPLES = ("reward_hacking",)  # findings that a few completions explain
CHECKS: dict[str, Callable[[Moment], Sighting]] = {
    check.__name__: check
    for check in (
        illnesses.too_easy,
        illnesses.too_hard,
        illnesses.reward_hacking,
        illnesses.format_only,
        illnesses.overfitting,
        illnesses.past_peak,
        illnesses.forgetting,
        illnesses.reward_scale,
        symptoms.kl_diverging,
        symptoms.kl_spike,
        symptoms.entropy_collapsed,
        symptoms.truncated,
        symptoms.never_ends,
        symptoms.ends_at_once,
        symptoms.repeated_endings,
        symptoms.gradient_spikes,
        symptoms.updates_skipped,
        symptoms.clipping,
        symptoms.learning_rate_small,
        symptoms.sampler_gap,
    )
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, at the step where it first showed."""

    name: str
    step: int
    figure: float
    text: str


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """All that a run's record shows, each at the first step where it holds."""
    found: dict[str, Finding] = {}
    for moment in _moments(record):
        found |= {finding.name: finding for finding in _see(moment, found)}
    return list(found.values())


def new_findings(record: Mapping[str, Any], known: Collection[str]) -> list[Finding]:
    """What the record shows at its end, but for findings of the names in `known`: what a run asks after each step."""
    return _see(_end(record), known)


def _see(now: Moment, known: Collection[str]) -> list[Finding]:
    step = now.steps[-1]["step"] if now.steps else 0
    seen = [(name, check(now)) for name, check in CHECKS.items() if name not in known]
    return [Finding(name, step, float(result[0]), result[1]) for name, result in seen if result]


def _end(record: Mapping[str, Any]) -> Moment:
    evals, device = record["evals"], (record.get("environment") or {}).get("device", "")
    validation, tests = ([e for e in evals if e.get("split") == split] for split in ("validation", "test"))
    return Moment(record["config"], record["steps"], validation, tests, device)


def _moments(record: Mapping[str, Any]) -> Iterator[Moment]:
    """The run after each step and each evaluation. A test after the first comes at the end, of an earlier policy."""
    end = _end(record)
    for n, row in enumerate(end.steps, 1):
        before = [e for e in end.evals if e["step"] < row["step"]]
        yield Moment(end.config, end.steps[:n], before, end.tests[:1], end.device)
        after = [e for e in end.evals if e["step"] <= row["step"]]
        if len(after) > len(before):
            yield Moment(end.config, end.steps[:n], after, end.tests[:1], end.device)
    yield end
