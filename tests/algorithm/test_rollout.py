"""A rollout: completions without a reward, tied groups that are drawn again, and the metrics of both."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.rollout import Rollout, concatenate, redraw_tied
from grpo.algorithm.update import Batch
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.record.step_metrics import STEP_METRICS
from grpo.step_probe import measured_step
from tasks.arithmetic import Arithmetic
from tasks.base import Problem, Reward
from tasks.rewards.scoring import RewardFunction
from tests.helpers.models import ragged_tokens

CONFIG = resolve({"model": "starter", "batch_size": 2, "num_generations": 4, "num_inner_updates": 1})


def made(function, config=CONFIG):
    """Return GRPO on the starter, whose reward is a function of the row of a completion."""
    reward = RewardFunction("mine", 1.0, lambda attempts, columns: [function(i) for i in range(len(attempts))])
    return GRPO(config, Arithmetic(), load("starter", torch.device("cpu")), [reward])


def test_a_completion_that_no_reward_applies_to_is_left_out_of_its_group_and_of_the_loss():
    grpo = made(lambda i: None if i % 4 == 0 else float(i % 4))  # 1, 2, 3 for the others
    _, rollout = grpo.sampler.sample(1, CONFIG.num_generations)
    assert rollout.applies.tolist() == [False, True, True, True] * 2
    expected = torch.tensor([0.0, -1.0, 0.0, 1.0] * 2) / (1 + 1e-4)
    torch.testing.assert_close(rollout.advantages, expected)
    batch = Batch.from_rollout(rollout, CONFIG)
    assert batch.sizes.num_completions == 6
    assert batch.tokens.completion_mask.any(1).tolist() == rollout.applies.tolist()
    _, entry = measured_step(grpo, 1)
    assert (entry["reward_mean"], entry["reward_std"]) == (2.0, 1.0)
    assert entry["reward/mine"] == 2.0
    [first, *_] = rollout.samples(1, 1)
    assert first["reward"] is None
    json.dumps(rollout.samples(1, 2), allow_nan=False)
    assert len(rollout.top_rewarded_wrong(8)) <= 6


def test_a_step_in_which_no_reward_applies_changes_nothing_and_has_no_ratio():
    grpo = made(lambda i: None)
    before = [p.clone() for p in grpo.policy.parameters()]
    outcome, entry = measured_step(grpo, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, grpo.policy.parameters(), strict=True))
    assert (entry["ratio_min"], entry["ratio_max"]) == (None, None)
    assert entry["reward_mean"] is None
    assert entry["tied_groups_fraction"] == 1
    assert entry["grad_norm"] == 0
    assert outcome.rollout.top_rewarded_wrong() == []


@pytest.mark.parametrize(("beta", "is_measured"), [(0.0, False), (0.04, True)])
def test_the_kl_is_null_without_a_reference(beta, is_measured):
    config = resolve(
        {"model": "starter", "batch_size": 1, "num_generations": 2, "num_inner_updates": 1, "beta": beta}
    )
    _, entry = measured_step(made(float, config), 1)
    assert (entry["kl"] is not None) == is_measured
    assert math.isfinite(entry["loss"])


def test_tied_means_equal_rewards_and_not_all_right_or_all_wrong():
    # 4 groups of 2: all wrong with different rewards (not tied); one right with equal rewards (tied); one right, and
    # all wrong, with different rewards (not tied).
    totals = [[0.4, 0.2], [0.4, 0.4], [1.0, 0.4], [0.0, 0.2]]
    right = [[False, False], [True, False], [True, False], [False, False]]
    redrawn = [[0.2, 0.2]]  # drawn in place of the second group, and tied again
    calls = []

    def draw(attempt, places):
        calls.append((attempt, list(places)))
        return a_scored_rollout(redrawn, [[False, False]])

    drawn, kept = redraw_tied(a_scored_rollout(totals, right), draw, 2)
    assert calls == [(1, [1]), (2, [1])]
    assert kept == [0, 5, 2, 3]
    assert drawn.tied.tolist() == [False, True, False, False, True, True]
    assert drawn.totals[5].tolist() == [0.2, 0.2]


def test_metrics_are_of_all_groups_drawn_and_the_kept_groups_have_names_of_their_own():
    # 3 groups of 2: one right; tied, all wrong; and the group that was drawn in place of the second, one right.
    drawn = a_scored_rollout([[1.0, 0.4], [0.2, 0.2], [1.0, 0.2]], [[True, False], [False, False], [True, False]])
    kept = drawn.pick([0, 2])
    result = SimpleNamespace(drawn=drawn, rollout=kept)
    formulas = {metric.name: metric.formula for metric in STEP_METRICS}
    assert formulas["accuracy"](result) == pytest.approx(2 / 6)
    assert formulas["kept_accuracy"](result) == pytest.approx(2 / 4)
    assert formulas["reward_mean"](result) == pytest.approx(3.0 / 6)
    assert formulas["tied_groups_fraction"](result) == pytest.approx(1 / 3)
    assert formulas["kept_tied_groups_fraction"](result) == 0.0
    assert formulas["resampled_groups"](result) == 1


def test_joined_rollouts_are_padded_and_picked_groups_trimmed():
    short, wide = ragged_tokens((3, 2), 2, columns=2), ragged_tokens((5,), 2, columns=4, seed=1)
    parts = [a_sampled_rollout(tokens) for tokens in (short, wide)]
    joined = concatenate(parts)
    assert joined.tokens.prompt_ids.shape == (3, 5)
    assert joined.tokens.completion_ids.shape == (6, 4)
    for group, (part, group_of_part) in enumerate([(0, 0), (0, 1), (1, 0)]):
        prompt = joined.tokens.prompt_ids[group][joined.tokens.prompt_mask[group]]
        tokens = parts[part].tokens
        assert torch.equal(prompt, tokens.prompt_ids[group_of_part][tokens.prompt_mask[group_of_part]])
    picked = joined.pick([1, 0])
    assert picked.tokens.completion_ids.shape == (4, 2)
    assert picked.tokens.completion_rows() == [short.completion_rows()[row] for row in (2, 3, 0, 1)]
    assert picked.completion_texts == [joined.completion_texts[row] for row in (2, 3, 0, 1)]


def a_sampled_rollout(tokens):
    """Return a rollout with these tokens; the text of a completion is the list of its ids."""
    return Rollout(
        problems=[Problem(f"What is {i}?", "1") for i in range(len(tokens.prompt_ids))],
        tokens=tokens,
        sample_logprobs=torch.zeros(tokens.completion_ids.shape),
        truncated=torch.zeros(len(tokens.completion_ids), dtype=torch.bool),
        completion_texts=[str(ids) for ids in tokens.completion_rows()],
    )


def a_scored_rollout(totals, correct):
    """Return a rollout with these rewards by group; `correct` says which completions are right."""
    rewards = [
        Reward(total, {"mine": total}, correct=is_right, well_formed=True)
        for group, rights in zip(totals, correct, strict=True)
        for total, is_right in zip(group, rights, strict=True)
    ]
    compared = torch.tensor(totals, dtype=torch.float64).view(-1, 1)
    tokens = ragged_tokens((2,) * len(totals), len(totals[0]), columns=2)
    return replace(a_sampled_rollout(tokens), rewards=rewards, compared=compared)
