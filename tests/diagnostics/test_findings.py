"""All findings: a healthy run has none, the task adds its advice, and they fit the terminal when printed."""

import re
from types import SimpleNamespace

import pytest

from grpo.diagnostics.findings import findings, new_findings
from grpo.measurer import Measurer
from grpo.report.progress import show_finding
from tasks.arithmetic import Arithmetic
from tasks.reverse import Reverse
from tests.helpers.sick_runs import HEALTHY, OPTIONS, accuracy, changed

TOO_HARD = {"tied_all_wrong_fraction": 0.95, "accuracy": 0.0}
SICK = {
    "too_easy": changed(steps={"tied_all_right_fraction": 0.95}),
    "too_hard": changed(steps=TOO_HARD, evals=accuracy(0.0), tests=[{"accuracy": 0.01}] * 2),
    "overfitting": changed(steps={"accuracy": lambda step: min(1.0, 0.3 + step / 50)}, evals=accuracy(0.3)),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_default_run_has_no_finding(seed):
    assert len(HEALTHY[seed]["steps"]) == 60
    assert findings(HEALTHY[seed]) == []


def test_a_record_with_nulls_or_without_the_newer_metrics_raises_nothing():
    assert findings({"config": {}, "steps": [], "evals": []}) == []
    for record in HEALTHY:
        for keep in (["step"], ["step", "reward_mean", "accuracy", "kl"]):
            rows = [{name: row.get(name) for name in keep} for row in record["steps"]]
            assert findings({**record, "steps": rows}) == []
            nulls = [dict.fromkeys(row, None) | {"step": row["step"]} for row in record["steps"]]
            assert findings({**record, "steps": nulls}) == []
        measured = ("step", "split", "accuracy", "n", "ci_low", "ci_high")
        assert findings({**record, "evals": [{name: e[name] for name in measured} for e in record["evals"]]}) == []


@pytest.mark.parametrize("well_formed", [0.0, 1.0])
def test_what_is_too_hard_says_whether_the_form_is_missing(well_formed):
    record = changed(
        steps=TOO_HARD, evals=accuracy(0.0) | {"well_formed": well_formed}, tests=[{"accuracy": 0.0}] * 2
    )
    [finding] = [f for f in findings(record) if f.name == "too_hard"]
    assert ("the form that the prompt asks for" in finding.text) == (well_formed == 0)


HINTS = [(task, name) for task in (Arithmetic(), Reverse()) for name in task.hints]


@pytest.mark.parametrize(("task", "name"), HINTS, ids=lambda value: getattr(value, "name", value))
def test_a_run_adds_the_advice_of_its_task_to_a_finding(task, name):
    record = {**SICK[name], "findings": []}
    [plain] = [f for f in new_findings(record, ()) if f.name == name]
    Measurer.diagnose(SimpleNamespace(metrics=SimpleNamespace(record=record), task=task, rollout=None), aloud=False)
    [finding] = [f for f in record["findings"] if f["name"] == name]
    assert finding["text"] == f"{plain.text} {task.hints[name]}"
    assert set(re.findall(r"--[a-z][\w-]*", finding["text"])) <= OPTIONS


def test_a_finding_is_a_paragraph_as_wide_as_the_terminal_and_a_model_cannot_colour_it(capsys, monkeypatch):
    finding = {"name": "reward_hacking", "step": 7, "text": "word --some-option " * 30, "examples": ["a\x1b[31mb\nc"]}
    for columns, widest in (("60", 60), ("250", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        show_finding(finding)
        lines = capsys.readouterr().out.splitlines()
        assert widest - 20 <= max(map(len, lines)) <= widest
        assert lines[0].startswith("step    7  reward_hacking: word")
        assert lines[-1] == "    a\\x1b[31mb\\nc"
        assert "--some-option" in lines[1]
