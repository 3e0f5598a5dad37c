"""Metrics of a step, computed by hand: the standard deviation of a reward part, the sampler gap, the entropy gap."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.config import TrainConfig
from grpo.generation import sampling
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.record.step_metrics import _spread
from grpo.runtime.ranks import ONE
from grpo.step_probe import entropy_gap, measured_step, sampler_gap
from tasks.arithmetic import Arithmetic


def test_the_spread_of_a_part_is_that_of_the_groups_where_it_differs():
    # Groups of 2: the standard deviation of (0, 1) is sqrt(1/2); (1, 1) is tied, and (None, 2) has only one value.
    assert _spread([0.0, 1.0, 1.0, 1.0, None, 2.0], 3) == pytest.approx(math.sqrt(0.5))
    assert _spread([1.0] * 6, 3) is None


def test_the_sampler_gap_is_the_largest_of_the_tokens_of_completions():
    sampled, scored = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.25]])

    def gap(mask):
        tokens = SimpleNamespace(completion_mask=torch.tensor([mask]))
        batch = SimpleNamespace(sizes=SimpleNamespace(num_completions=1), old_logprobs=scored, tokens=tokens)
        return sampler_gap(SimpleNamespace(rollout=SimpleNamespace(sample_logprobs=sampled), batch=batch), ONE)

    assert gap([True, True]) == 0.5
    assert gap([False, True]) == 0.25
    assert gap([False, False]) == 0.0


def gap(applies=True, **settings):
    """Return the entropy gap of two completions of two tokens and one token; the last entries are padding."""
    mask = torch.tensor([[True, True], [True, False]])
    batch = SimpleNamespace(
        old_logprobs=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
        tokens=SimpleNamespace(completion_mask=mask),
        sizes=SimpleNamespace(num_tokens=3),
    )
    rollout = SimpleNamespace(applies=torch.tensor([True, applies]))
    updates = [SimpleNamespace(entropies=torch.tensor([[0.5, 1.5], [1.0, 9.0]]))]
    return entropy_gap(SimpleNamespace(batch=batch, rollout=rollout, updates=updates), TrainConfig(**settings), ONE)


def test_the_entropy_gap_by_hand():
    # -log p minus entropy: 1 - 0.5, 2 - 1.5 and 0.5 - 1 over 3 tokens; the squares are 0.25 each
    assert gap() == pytest.approx((0.5 / 3, math.sqrt(0.75) / 3))


@pytest.mark.parametrize("settings", [{"resample_tied": 1}, {"mask_truncated_completions": True}])
def test_there_is_no_entropy_gap_where_completions_are_chosen_by_what_was_sampled(settings):
    assert gap(**settings) is None
    assert gap(applies=False) is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_gap_shows_a_sampler_of_another_temperature(monkeypatch, temperature):
    settings = {"device": "cpu", "temperature": temperature, "batch_size": 32}
    settings |= {"learning_rate": 0.0, "num_inner_updates": 1, "beta": 0.0}
    config = resolve(settings)
    grpo = GRPO(config, Arithmetic(), load(config.model, torch.device("cpu")))

    def standard_errors():
        metrics = measured_step(grpo, 1)[1]
        return metrics["entropy_gap"] / metrics["entropy_gap_error"]

    assert abs(standard_errors()) < 3
    true = sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda logits, uniforms, t: true(logits, uniforms, 0.5 * t))
    assert standard_errors() < -6
