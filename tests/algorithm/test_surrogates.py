"""CISPO and GMPO against hand-derived values and gradients in the four quadrants, and rewards normalised apart."""

import math

import pytest
import torch

from grpo.algorithm.advantages import decoupled_advantages, group_advantages
from grpo.algorithm.grpo import GRPO
from grpo.algorithm.loss import cispo_surrogate, gmpo_surrogate, grpo_loss
from grpo.config import AGGREGATIONS, SURROGATES, TrainConfig
from grpo.model.loading import load
from grpo.model_card import resolve
from tasks.arithmetic import Arithmetic
from tasks.rewards.scoring import RewardFunction

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(1.5, 2.0, 1.2), (0.5, 2.0, 0.5), (1.5, -2.0, 1.2), (0.5, -2.0, 0.5)],  # min(ratio, 1.2), whatever the sign
)
def test_the_four_quadrants_of_cispo(ratio, advantage, weight):
    logprobs = torch.tensor([[-0.7]], requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    config = TrainConfig(surrogate="cispo", epsilon=0.2, beta=0.0)
    tokens = grpo_loss(logprobs, old, None, torch.tensor([advantage]), ONE, config, config.beta)
    tokens.loss.sum().backward()
    assert tokens.loss.item() == pytest.approx(-weight * advantage * -0.7, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(-weight * advantage, abs=1e-6)  # the weight has no gradient
    assert tokens.clipped.item() == (ratio > 1.2)


def test_cispo_has_an_upper_bound_alone_and_its_own_epsilon():
    logprobs, ratio = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[0.01, 4.9, 9.0]])
    surrogate = cispo_surrogate(logprobs, ratio, torch.tensor([1.0]), 4.0)
    assert surrogate[0].tolist() == pytest.approx([-0.01, -4.9, -5.0])


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "kept", "gradient"),
    [
        (0.5, 2.0, 0.4, 0.0),  # good and already more likely: stop
        (-0.5, 2.0, -0.5, 2.0 * math.exp(-0.5)),  # good but less likely: full push up
        (0.5, -2.0, 0.5, -2.0 * math.exp(0.5)),  # bad but more likely: full push down
        (-0.5, -2.0, -0.4, 0.0),  # bad and already less likely: stop
    ],
)
def test_the_four_quadrants_of_gmpo(log_ratio, advantage, kept, gradient):
    x = torch.tensor([[log_ratio]], requires_grad=True)
    surrogate, clipped = gmpo_surrogate(x, torch.tensor([advantage]), ONE, 0.4, 0.4)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(advantage * math.exp(kept), abs=1e-6)
    assert x.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert clipped.item() == (kept != log_ratio)


def test_gmpo_is_the_geometric_mean_of_a_completions_ratios():
    # Ratios 2 (clipped to e^0.4), 0.5 and, on padding, 9; A = 3. The surrogate is 3 · (e^0.4 · 0.5)^(1/2) in each
    # column, and so is its average. Its gradient is half of that for the second log-ratio, and 0 for the others.
    x = torch.tensor([[math.log(2.0), math.log(0.5), math.log(9.0)]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    surrogate, clipped = gmpo_surrogate(x, torch.tensor([3.0]), mask, 0.4, 0.4)
    value = 3 * math.sqrt(math.exp(0.4) * 0.5)
    assert surrogate[0].tolist() == pytest.approx([value] * 3, abs=1e-6)
    surrogate[mask].mean().backward()
    assert x.grad[0].tolist() == pytest.approx([0.0, value / 2, 0.0], abs=1e-6)
    assert clipped.tolist() == [[True, False, False]]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_the_first_pass_all_have_the_policy_gradient(surrogate):
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.5, -0.5])
    config = TrainConfig(surrogate=surrogate, beta=0.0)
    tokens = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, config, config.beta)
    tokens.loss.mean(1).sum().backward()  # by completion
    torch.testing.assert_close(logprobs.grad, -advantages[:, None].expand(2, 2) / 2)


@pytest.mark.parametrize("surrogate", ["cispo", "gmpo"])
def test_a_surrogate_of_token_ratios_refuses_the_ratio_of_a_sequence(surrogate):
    with pytest.raises(ValueError, match=f"--surrogate {surrogate} needs --ratio token"):
        TrainConfig(surrogate=surrogate, ratio="sequence")


def test_rewards_normalised_apart_by_hand():
    # one group of 4; part a is 1, 0, 0, 0 (weighted 1), part b 0, 0, 0.2, 0.2 (weighted 0.2)
    parts = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.2], [0.0, 0.2]], dtype=torch.float64)
    a = [0.75 / 0.5, -0.25 / 0.5, -0.25 / 0.5, -0.25 / 0.5]  # std with n - 1: sqrt((0.5625 + 3 · 0.0625) / 3) = 0.5
    b = [x / (1 / math.sqrt(3)) for x in (-0.5, -0.5, 0.5, 0.5)]  # without its weight 0, 0, 1, 1: std sqrt(1/3)
    total = [x + 0.2 * y for x, y in zip(a, b, strict=True)]
    std = math.sqrt(sum(x * x for x in total) / 3)
    found = decoupled_advantages(parts, torch.tensor([1.0, 0.2]), 4)
    assert found.tolist() == pytest.approx([x / std for x in total], abs=2e-3)  # the floors are 1e-4
    # The parts 1, 0 and 0, 1 have the same total, but different advantages.
    even = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    summed = group_advantages(even.sum(1), 6)
    apart = decoupled_advantages(even, torch.ones(2), 6)
    assert summed[0] == summed[1]
    assert (apart[0] - apart[1]).abs() > 0.05


def test_a_weight_counts_once_with_every_scale_by_hand():
    # two groups of 2. Part a, weight 2, is 0, 1, 0, 0 without its weight; part b, weight −0.5, is 0, 4, 0, 2.
    a, b = [0.0, 1.0, 0.0, 0.0], [0.0, 4.0, 0.0, 2.0]
    parts = torch.tensor([[2 * x, -0.5 * y] for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    # r − mean of a: −0.5, 0.5, 0, 0; of b: −2, 2, −1, 1
    deviations = [(-0.5, -2.0), (0.5, 2.0), (0.0, -1.0), (0.0, 1.0)]
    # std with n − 1. Of pairs that differ by d: d / sqrt(2). Of all four of a: mean 1/4, squares 3/16 + 9/16 = 3/4,
    # std 1/2; of b: mean 1.5, squares 2.25 + 6.25 + 2.25 + 0.25 = 11, std sqrt(11 / 3)
    stds = {
        "none": [(1.0, 1.0)] * 4,
        "batch": [(0.5 + 1e-4, math.sqrt(11 / 3) + 1e-4)] * 4,
        "group": [(1 / math.sqrt(2) + 1e-4, 4 / math.sqrt(2) + 1e-4)] * 2 + [(1.0, 2 / math.sqrt(2) + 1e-4)] * 2,
    }
    for scale, divisors in stds.items():
        total = [
            2 * x / of_a - 0.5 * y / of_b for (x, y), (of_a, of_b) in zip(deviations, divisors, strict=True)
        ]  # with "none": −1 + 1 = 0, 1 − 1 = 0, 0.5, −0.5
        std = math.sqrt(sum(x * x for x in total) / 3) + 1e-4
        found = decoupled_advantages(parts, torch.tensor([2.0, -0.5]), 2, scale)
        assert found.tolist() == pytest.approx([x / std for x in total], abs=1e-6), scale


def test_the_floor_of_the_std_is_added_to_that_of_the_reward_without_its_weight():
    # with its weight part b, 0, 0, 0.001, 0.001, has a std of 0.001 · sqrt(1/3) = 5.8e-4, to which 1e-4 adds a sixth
    parts = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.001], [0.0, 0.001]], dtype=torch.float64)
    a = [x / (0.5 + 1e-4) for x in (0.75, -0.25, -0.25, -0.25)]
    b = [x / (1 / math.sqrt(3) + 1e-4) for x in (-0.5, -0.5, 0.5, 0.5)]
    total = [x + 0.001 * y for x, y in zip(a, b, strict=True)]
    std = math.sqrt(sum(x * x for x in total) / 3) + 1e-4
    found = decoupled_advantages(parts, torch.tensor([1.0, 0.001]), 4)
    assert found.tolist() == pytest.approx([x / std for x in total], abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_reward_of_weight_0_has_no_part(scale):
    parts = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    both = decoupled_advantages(parts, torch.tensor([1.0, 0.0]), 2, scale)
    assert both.tolist() == decoupled_advantages(parts[:, :1], torch.ones(1), 2, scale).tolist()


def test_a_negative_weight_keeps_its_sign_and_what_does_not_apply_has_no_part():
    parts = torch.tensor([[0.0, math.nan], [-2.0, 1.0], [0.0, 0.0], [-2.0, math.nan]], dtype=torch.float64)
    found = decoupled_advantages(parts, torch.tensor([-2.0, 1.0]), 4)
    alone = decoupled_advantages(parts[:, :1], torch.tensor([-2.0]), 4)
    assert (alone[[0, 2]] > 0).all()
    assert found[0] > 0 > found[3]
    assert found.isfinite().all()


def test_tied_groups_are_exactly_zero_and_all_tied_are_finite():
    parts = torch.tensor([[0.2, 0.6]] * 4 + [[0.2, 0.0], [0.0, 0.6], [0.2, 0.6], [0.0, 0.0]], dtype=torch.float64)
    found = decoupled_advantages(parts, torch.tensor([0.2, 0.6]), 4)
    assert found[:4].tolist() == [0.0] * 4
    assert (found[4:] != 0).all()
    assert decoupled_advantages(parts[:4], torch.tensor([0.2, 0.6]), 4).tolist() == [0.0] * 4


def test_the_choices_are_those_of_the_command_line():
    assert SURROGATES == ("clip", "cispo", "gmpo")
    assert AGGREGATIONS == ("sum_then_normalize", "normalize_then_sum")


def test_rewards_of_a_run_that_differ_in_the_ninth_digit_are_compared():
    function = RewardFunction("a", 1.0, lambda attempts, columns: [1e8, 1e8 + 1, 1e8, 1e8])
    settings = {"model": "starter", "batch_size": 1, "num_generations": 4}
    for aggregation in AGGREGATIONS:
        config = resolve({**settings, "multi_objective_aggregation": aggregation})
        grpo = GRPO(config, Arithmetic(), load("starter", torch.device("cpu")), [function])
        _, rollout = grpo.sampler.sample(1, 4)
        assert rollout.advantages[1] > 1
        assert rollout.advantages[0] < 0
