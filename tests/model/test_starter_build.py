"""The script that made the starter: a step of its training, its learning rate, and the scores in its README.md."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo.model_card import STARTER
from grpo.starter import build


def test_two_steps_of_its_training_change_all_weights_and_keep_them_finite(starter, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 6)
    monkeypatch.setattr(build, "STEPS", 2)
    lm = replace(starter, model=copy.deepcopy(starter.model))
    build.train(lm)
    before = dict(starter.model.named_parameters())
    for name, weight in lm.model.named_parameters():
        assert weight.isfinite().all()
        assert not torch.equal(weight, before[name]), name


def test_the_learning_rate_rises_to_its_first_value_and_falls_twice():
    rates = [build.learning_rate(step) for step in (build.WARM_UP - 1, build.WARM_UP, build.DIRECT_FROM)]
    assert rates == pytest.approx([2e-3, 2e-3, 3e-4])
    assert build.learning_rate(build.STEPS) == pytest.approx(2e-5)


def test_the_scores_of_a_new_model_replace_the_rows_of_the_table(starter, monkeypatch):
    shown = "50.0% [1.0, 99.0], n = 2"
    monkeypatch.setattr(build, "accuracy_text", lambda entry: shown)
    monkeypatch.setattr(build, "TEST_PROBLEMS", 2)
    text = build.readme(starter)
    assert text.count(f"| {shown} |") == text.count(", n = ") == 13
    assert text.splitlines()[:5] == (STARTER / "README.md").read_text(encoding="utf-8").splitlines()[:5]
