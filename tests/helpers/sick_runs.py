"""Records of healthy runs, the same with one thing changed, and what must hold of the findings in them."""

import copy
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

from grpo.diagnostics.findings import CHECKS, findings, new_findings

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures"
HEALTHY = [json.loads((FIXTURES / f"healthy_seed_{seed}.json").read_text(encoding="utf-8")) for seed in (0, 1, 2)]
README = (ROOT / "grpo/README.md").read_text(encoding="utf-8")
OPTIONS = set(re.findall(r"`(--[\w-]+)`", README[README.index("## Settings") :]))


def changed(steps=None, evals=None, config=None, first=1, tests=None, length=80, outlook=None, before_sft=None):
    """Return the healthy run with other values of some metrics from step `first` on; a function gets the step."""
    record = copy.deepcopy(HEALTHY[0])
    record["steps"] = record["steps"][:length]
    record["config"] |= config or {}
    record["outlook"] = outlook
    record["before_sft"] = before_sft
    for row in record["steps"]:
        if row["step"] >= first:
            row |= {name: value_at(value, row["step"]) for name, value in (steps or {}).items()}
    for row in record["evals"]:
        if row["split"] == "validation":
            row |= {name: value_at(value, row["step"]) for name, value in (evals or {}).items()}
    for row, more in zip([e for e in record["evals"] if e["split"] == "test"], tests or (), strict=False):
        row |= more
    record["evals"] = [e for e in record["evals"] if e["step"] <= length]
    return record


def value_at(value, step):
    """Return a value, or that of a function at a step."""
    return value(step) if callable(value) else value


def every(n, value, otherwise):
    """Return a function of the step that gives `value` at every nth."""
    return lambda step: value if step % n == 0 else otherwise


def accuracy(value):
    """Return validation accuracies, each with an interval as wide as for 500 problems."""
    return {
        "accuracy": value,
        "ci_low": lambda step: value_at(value, step) - 0.04,
        "ci_high": lambda step: value_at(value, step) + 0.04,
    }


def by_category(words):
    """Return validation accuracies of two categories, `words` as a function of the step, with intervals as of 500."""

    def figures(value):
        return {"accuracy": value, "n": 500, "ci_low": value - 0.04, "ci_high": value + 0.04}

    return {"categories": lambda step: {"words": figures(words(step)), "sums": figures(0.5 + step / 200)}}


def names(record):
    """Return the names of the findings in a record."""
    return [finding.name for finding in findings(record)]


def check_fires_once(name, record):
    """Check that a finding is in a record once, with a figure, an advice, and options that exist."""
    [finding] = [f for f in findings(record) if f.name == name]
    assert finding.step in range(0 if name in ("nothing_to_learn", "fine_tuning_forgets") else 1, 81)
    assert math.isfinite(finding.figure)
    assert re.search(r"\d", finding.text)  # the figure
    assert " --" in finding.text or "(--" in finding.text  # what to change
    assert set(re.findall(r"--[a-z][\w-]*", finding.text)) <= OPTIONS
    json.dumps(asdict(finding), allow_nan=False)
    assert new_findings(record, list(CHECKS)) == []


def check_same_step_by_step(record):
    """Check that a run that looks after every step and evaluation finds what the whole record shows."""
    seen = []
    so_far = {**record, "steps": [], "evals": []}

    def look():
        seen.extend(new_findings(so_far, [f.name for f in seen]))

    look()
    first_test, *evals, last_test = record["evals"]
    so_far["evals"] += [first_test, evals[0]]
    look()
    for row in record["steps"]:
        so_far["steps"].append(row)
        look()
        if due := [e for e in evals if e["step"] == row["step"]]:
            so_far["evals"].extend(due)
            look()
    so_far["evals"].append(last_test)
    look()
    assert seen == findings(record)
