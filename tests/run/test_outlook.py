"""Test the outlook: its shares by hand, its cost, and that the training does not depend on it."""

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.config import TrainConfig
from grpo.launch import outlook as module
from grpo.launch.outlook import outlook
from grpo.model.loading import load
from tasks.arithmetic import Arithmetic

CONFIG = TrainConfig(batch_size=2, num_generations=4, max_new_tokens=22, num_inner_updates=1)


def a_grpo(config=CONFIG):
    """Return the starter with its optimizer."""
    return GRPO(config, Arithmetic(), load("starter", torch.device("cpu")))


@pytest.fixture
def grpo():
    """Return the starter with the settings that the tests share."""
    return a_grpo()


def test_the_shares_are_those_of_the_rollout(grpo, monkeypatch):
    seen = []
    true = type(grpo.sampler).sample
    monkeypatch.setattr(type(grpo.sampler), "sample", lambda *args: seen.append(true(*args)) or seen[-1])
    shares, seconds = outlook(grpo, CONFIG)
    [(_, rollout)] = seen
    groups = [rollout.rewards[:4], rollout.rewards[4:]]
    assert shares["groups"] == 2
    assert shares["num_generations"] == 4
    assert shares["pass_at_1"] == sum(r.correct for r in rollout.rewards) / 8
    assert shares["pass_at_g"] == sum(any(r.correct for r in group) for group in groups) / 2
    assert shares["all_right"] == sum(all(r.correct for r in group) for group in groups) / 2
    assert shares["teaching"] == sum(len({r.total for r in group}) > 1 for group in groups) / 2
    assert shares["well_formed"] == sum(r.well_formed for r in rollout.rewards) / 8
    assert shares["truncated"] == 0.0
    assert 0 < seconds < 60


def test_a_step_is_the_same_after_a_look(grpo):
    before = a_grpo().step(1).rollout
    outlook(grpo, CONFIG)
    after = grpo.step(1).rollout
    assert before.completion_texts == after.completion_texts
    assert torch.equal(before.sample_logprobs, after.sample_logprobs)
    problems = {p.question for p in after.problems}
    assert not problems & {Arithmetic().training_problem(0, 0, row).question for row in range(2)}


def test_its_groups_are_as_large_as_those_of_the_first_step():
    config = TrainConfig(batch_size=2, group_schedule="6:2", max_new_tokens=4, num_iterations=10)
    assert outlook(a_grpo(config), config)[0]["num_generations"] == 6


def test_it_looks_at_no_more_groups_than_a_step_has_and_at_eight_at_most():
    assert module.GROUPS == 8
    config = TrainConfig(batch_size=10, num_generations=2, max_new_tokens=4, num_inner_updates=1)
    assert outlook(a_grpo(config), config)[0]["groups"] == 8
