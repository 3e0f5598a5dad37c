"""A rollout: completions that no reward applies to, and what its step says of them."""

import json
import math

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.update import Batch
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.stopwatch import Stopwatch
from tasks.arithmetic import Arithmetic
from tasks.rewards.scoring import RewardFunction

CONFIG = resolve({"model": "starter", "batch_size": 2, "num_generations": 4, "num_inner_updates": 1})


def made(function, config=CONFIG):
    """Return a policy that is rewarded by a function of the number of the completion."""
    reward = RewardFunction("mine", 1.0, lambda attempts, columns: [function(i) for i in range(len(attempts))])
    return GRPO(config, Arithmetic(), load("starter", torch.device("cpu")), [reward])


def test_a_completion_that_no_reward_applies_to_is_left_out_of_its_group_and_of_the_loss():
    grpo = made(lambda i: None if i % 4 == 0 else float(i % 4))  # 1, 2, 3 for the others
    rollout = grpo.sampler.rollout(1, CONFIG, Stopwatch())
    assert rollout.applies.tolist() == [False, True, True, True] * 2
    expected = torch.tensor([0.0, -1.0, 0.0, 1.0] * 2) / (1 + 1e-4)
    torch.testing.assert_close(rollout.advantages, expected)
    batch = Batch.from_rollout(rollout, CONFIG)
    assert batch.sizes.num_completions == 6
    assert batch.tokens.completion_mask.any(1).tolist() == rollout.applies.tolist()
    _, entry = grpo.step(1)
    assert (entry["reward_mean"], entry["reward_std"]) == (2.0, 1.0)
    assert entry["reward/mine"] == 2.0
    [first, *_] = rollout.samples(1, 1)
    assert first["reward"] is None
    json.dumps(rollout.samples(1, 2), allow_nan=False)
    assert len(rollout.top_rewarded_wrong(8)) <= 6


def test_a_step_in_which_no_reward_applies_changes_nothing_and_has_no_ratio():
    grpo = made(lambda i: None)
    before = [p.clone() for p in grpo.policy.parameters()]
    rollout, entry = grpo.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, grpo.policy.parameters(), strict=True))
    assert (entry["ratio_min"], entry["ratio_max"]) == (None, None)
    assert entry["reward_mean"] is None
    assert entry["tied_groups_fraction"] == 1
    assert entry["grad_norm"] == 0
    assert rollout.top_rewarded_wrong() == []


@pytest.mark.parametrize(("beta", "is_measured"), [(0.0, False), (0.04, True)])
def test_the_kl_is_null_without_a_reference(beta, is_measured):
    config = resolve(
        {"model": "starter", "batch_size": 1, "num_generations": 2, "num_inner_updates": 1, "beta": beta}
    )
    _, entry = made(float, config).step(1)
    assert (entry["kl"] is not None) == is_measured
    assert math.isfinite(entry["loss"])
