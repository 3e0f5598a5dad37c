"""Rewards to advantages, against hand-computed numbers."""

import math

import pytest
import torch

from grpo.algorithm.advantages import group_advantages


def test_a_group_of_four_by_hand():
    # rewards 0, 0.2, 0.4, 1.0: mean 0.4; squares of deviations 0.16, 0.04, 0, 0.36, sum 0.56;
    # std with G − 1 = sqrt(0.56 / 3) = 0.4320494
    std = math.sqrt(0.56 / 3)
    expected = [(r - 0.4) / (std + 1e-4) for r in (0.0, 0.2, 0.4, 1.0)]
    advantages = group_advantages(torch.tensor([0.0, 0.2, 0.4, 1.0]), 4)
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.2, 0.4, 1.0, 1 / 3, 0.1 + 0.2, 1e6])
@pytest.mark.parametrize("group", [2, 8, 13])
def test_a_flat_group_gets_exactly_zero(reward, group):
    # (r − mean) / (std + 1e-8) gives −1.49 for eight rewards of 0.2 in float32
    assert group_advantages(torch.full((group,), reward), group).tolist() == [0.0] * group


def test_each_group_is_compared_with_itself_only():
    rewards = torch.tensor([0.0, 1.0, 10.0, 20.0])
    a, b, c, d = group_advantages(rewards, 2).tolist()
    # two rewards: deviations ±d/2, std d/sqrt(2), so ±1/sqrt(2) whatever the scale
    assert a == pytest.approx(-1 / math.sqrt(2), abs=2e-4)
    assert b == pytest.approx(1 / math.sqrt(2), abs=2e-4)
    assert c == pytest.approx(a, abs=2e-4)
    assert d == pytest.approx(b, abs=2e-4)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4), 1)


def test_without_scaling_and_scaled_over_the_batch_by_hand():
    # groups 0, 1 and 2, 6: means 0.5 and 4. All four: mean 2.25, squares 5.0625 + 1.5625 + 0.0625 + 14.0625 = 20.75
    rewards = torch.tensor([0.0, 1.0, 2.0, 6.0])
    assert group_advantages(rewards, 2, "none").tolist() == [-0.5, 0.5, -2.0, 2.0]
    std = math.sqrt(20.75 / 3) + 1e-4
    expected = torch.tensor([-0.5, 0.5, -2.0, 2.0]) / std
    torch.testing.assert_close(group_advantages(rewards, 2, "batch"), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_flat_group_gets_exactly_zero_with_every_scale(scale):
    advantages = group_advantages(torch.tensor([0.2] * 8 + [0.0, 1.0] * 4), 8, scale)
    assert advantages[:8].tolist() == [0.0] * 8
    assert advantages[8:].abs().min() > 0


NAN = float("nan")


def test_a_completion_without_a_reward_has_no_part_in_its_group():
    # The other three: mean 2, deviations −1, 0, 1, std 1.
    advantages = group_advantages(torch.tensor([1.0, NAN, 2.0, 3.0]), 4)
    expected = torch.tensor([-1.0, 0.0, 0.0, 1.0]) / (1 + 1e-4)
    torch.testing.assert_close(advantages, expected)
    assert group_advantages(torch.tensor([NAN, NAN, NAN, 1.0]), 4).tolist() == [0.0] * 4, "nothing to compare with"
    assert group_advantages(torch.tensor([NAN] * 4), 2).tolist() == [0.0] * 4
    batch = group_advantages(torch.tensor([1.0, 3.0, NAN, 5.0]), 2, "batch")  # std of 1, 3, 5 is 2
    torch.testing.assert_close(batch, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (2 + 1e-4))


def test_large_rewards_that_differ_by_little_are_not_tied():
    # float32 has steps of 8 at 1e8
    rewards = torch.tensor([1e8, 1e8 + 1, 1e8, 1e8 + 1], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, 4, "none"), torch.tensor([-0.5, 0.5, -0.5, 0.5]))
