"""One inner update: micro-batches, the first ratio, the direction of the KL, and what never reaches the weights."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo.algorithm.reference import logprobs_in_passes
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.ranks import ONE
from grpo.step_probe import update_stats
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.rollouts import a_batch
from tests.helpers.scoring import scorer_for

CONFIG = TrainConfig(batch_size=3, num_generations=3, beta=0.1, clip_grad_norm=1e9, learning_rate=1e-3)
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0, 0.0, -1.0, 0.3, 0.7])


def one_update(model, reference, config=CONFIG, advantages=ADVANTAGES, updates=1, learning_rate=0.0, rows=9):
    """Update on a ragged rollout; return the statistics of each update. With rate 0 only the gradient is made."""
    update = Updater(model, config, scorer_for(model), AdaptiveMicrobatch("the update", rows, 3))
    update.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    batch = a_batch(ragged_tokens(), advantages, 16)
    if reference is not None:
        ref_logprobs = logprobs_in_passes(scorer_for(reference), reference, batch.tokens, config.temperature, rows)
        batch = replace(batch, ref_logprobs=ref_logprobs)
    results = []
    for _ in range(updates):
        results.append(update.inner_update(batch, config.beta, rows))
        batch = replace(batch, old_logprobs=results[0].logprobs)
    return update_stats(results, batch, config, ONE)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("rows", [8, 6, 5, 3, 2, 1])  # in whole groups of 3, then in parts of one
def test_micro_batches_give_the_gradient_of_one_large_batch(rows):
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    whole = one_update(model, reference)[0]
    expected = flat_gradient(model)
    parts = one_update(model, reference, rows=rows)[0]
    assert ((flat_gradient(model) - expected).norm() / expected.norm()).item() < 1e-5
    for name in ("loss", "kl", "entropy", "clip_fraction", "ratio_min", "ratio_max"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-5), name


def test_the_ratio_is_exactly_one_in_the_first_inner_update_and_moves_in_the_second():
    model = tiny_model("qwen2")
    first, second = one_update(model, None, replace(CONFIG, beta=0.0), updates=2, learning_rate=0.1)
    assert first.ratio_min == first.ratio_max == 1.0
    assert first.clip_fraction == 0.0
    assert second.ratio_min < 1.0 < second.ratio_max


def test_the_kl_of_a_policy_with_itself_is_zero():
    model = tiny_model("llama")
    assert one_update(model, copy.deepcopy(model))[0].kl == pytest.approx(0, abs=1e-9)


def test_updates_without_advantages_bring_a_perturbed_policy_back_to_the_reference():
    # the sign of beta inside a negated objective: with it wrong, this rises
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    stats = one_update(model, reference, replace(CONFIG, beta=1.0), torch.zeros(9), updates=30, learning_rate=0.02)
    assert stats[0].kl > 0.01
    assert stats[-1].kl < 0.5 * stats[0].kl


def test_flat_groups_without_a_reference_leave_a_gradient_of_exactly_zero():
    model = tiny_model("llama")
    one_update(model, None, replace(CONFIG, beta=0.0), torch.zeros(9))
    assert flat_gradient(model).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(bad):
    model = tiny_model("llama")
    before = flat_weights(model)
    advantages = ADVANTAGES.clone()
    advantages[4] = bad
    stats = one_update(model, None, replace(CONFIG, beta=0.0), advantages, learning_rate=0.1)
    assert not stats[0].applied
    assert torch.equal(before, flat_weights(model))


def test_one_gradient_that_is_not_finite_never_reaches_the_weights():
    model = tiny_model("llama")
    before = flat_weights(model)
    hook = model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g * float("nan"))
    stats = one_update(model, None, replace(CONFIG, beta=0.0), learning_rate=0.1)
    assert not stats[0].applied
    assert torch.equal(before, flat_weights(model))
    hook.remove()
    assert one_update(model, None, replace(CONFIG, beta=0.0), learning_rate=0.1)[0].applied


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    model = tiny_model("llama")
    stats = one_update(model, None, replace(CONFIG, beta=0.0, clip_grad_norm=0.01))[0]
    assert stats.grad_norm > 0.01
    assert flat_gradient(model).norm().item() == pytest.approx(0.01, rel=1e-3)
