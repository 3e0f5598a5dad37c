"""Drift: its value, its baseline in a checkpoint, and that measuring it does not change training."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from grpo.evaluation.drift import DriftBaseline, answer_logprobs
from grpo.evaluation.evaluator import Evaluator
from grpo.generation.decoding import Decoder
from grpo.record.checkpoint import newest_checkpoint
from tasks.unrelated import QUESTIONS
from tests.helpers.runs import a_tiny_model, trained


def moved(lm, amount=0.01):
    """Return the same model with noise added to its weights."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return replace(lm, model=model)


def test_the_drift_is_0_at_the_start_and_the_mean_difference_after(starter):
    start = DriftBaseline.record(starter, QUESTIONS[:5], Decoder(), 256)
    assert all(len(answer) <= 24 for answer in start.answers)
    assert start.drift(starter, 256) == 0.0
    other = moved(starter)
    # Compute it again, row by row, with one plain forward pass over prompt and answer.
    differences = []
    for prompt, answer, before in zip(start.prompts, start.answers, start.logprobs, strict=True):
        with torch.no_grad():
            logits = other.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        now = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        differences += [x - y for x, y in zip(before, now, strict=True)]
    assert start.drift(other, 256) == pytest.approx(sum(differences) / len(differences), abs=1e-5)
    assert start.drift(other, 2) == pytest.approx(start.drift(other, 256), abs=1e-5)
    assert start.drift(other, 256) > 0


def test_a_baseline_survives_json_to_the_bit(starter):
    start = DriftBaseline.record(starter, QUESTIONS, Decoder(), 256)
    text = json.dumps(start.to_dict(), allow_nan=False)
    assert DriftBaseline(**json.loads(text)) == start
    assert DriftBaseline.is_state(json.loads(text))
    assert start.logprobs == answer_logprobs(starter, start.prompts, start.answers, 256)


def test_a_drift_that_is_not_a_number_is_not_measured(starter):
    start = DriftBaseline.record(starter, QUESTIONS[:2], Decoder(), 256)
    broken = moved(starter)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    assert start.drift(broken, 256) is None


GOOD = {"prompts": [[1, 2]], "answers": [[3]], "logprobs": [[-0.5]]}


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": [["1"]]},
        {"answers": [[3, 4]]},
        {"logprobs": [[None]]},
        {"prompts": []},
        {"answers": [[]]},
        {"x": 1},
    ],
)
def test_what_cannot_be_a_baseline_is_recognised(change):
    assert DriftBaseline.is_state(GOOD)
    assert not DriftBaseline.is_state({**GOOD, **change})


# --- runs of a tiny model ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a tiny model."""
    return a_tiny_model(tmp_path_factory.mktemp("drift") / "model")


def evals_of(record):
    """Return the evaluations of a record without their times."""
    return [{k: v for k, v in e.items() if "time" not in k} for e in record["evals"]]


def test_a_run_reports_drift_and_measures_it_exactly_after_a_resume(tiny, tmp_path):
    whole, out = trained(tiny, tmp_path / "whole", num_iterations=4, pass_at_k=2)
    assert "drift 0." in out
    assert "pass@2" in out
    assert "by category, after" in out
    assert [e["drift"] for e in whole["evals"] if e["step"] == 0] == [0.0] * 2
    assert all(e["drift"] > 0 for e in whole["evals"] if e["step"])
    assert set(whole["evals"][0]["pass_at_k"]) == {"1", "2"}
    assert "drift" in (tmp_path / "whole/saved_model/README.md").read_text(encoding="utf-8")
    trained(tiny, tmp_path / "cut", num_iterations=2, pass_at_k=2)
    again, _ = trained(tiny, tmp_path / "cut", num_iterations=4, pass_at_k=2)
    by_step = {(e["step"], e["split"]): e for e in evals_of(whole)}
    for entry in evals_of(again):
        assert by_step.get((entry["step"], entry["split"]), entry) == entry


def test_measuring_drift_changes_nothing_that_is_trained(tiny, tmp_path, monkeypatch):
    trained(tiny, tmp_path / "with", num_iterations=3)
    monkeypatch.setattr(Evaluator, "remember_start", lambda *_: None)
    record, _ = trained(tiny, tmp_path / "without", num_iterations=3)
    assert [e["drift"] for e in record["evals"]] == [None] * len(record["evals"])
    one, two = (newest_checkpoint(tmp_path / name)[0].policy for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_continues_without_drift_from_a_checkpoint_that_has_no_baseline(tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "remember_start", lambda *_: None)  # as in earlier versions
        trained(tiny, tmp_path, num_iterations=2)
    record, _ = trained(tiny, tmp_path, num_iterations=4)
    assert record["evals"][-1]["drift"] is None
