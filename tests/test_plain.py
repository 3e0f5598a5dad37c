"""The plain loop against the fast one: the same completions, and the same weights after three steps."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo import plain
from grpo.algorithm.grpo import GRPO
from grpo.model.loading import load_policy
from grpo.model_card import resolve
from tasks.registry import make_task

STEPS = 3
SETTINGS = resolve({"model": "starter", "device": "cpu"})  # the starter's own
FEWER = {"batch_size": 2, "num_generations": 4}
SAME = 1e-5  # of a weight that 15 updates move by up to 4.5e-5


@pytest.fixture(scope="module")
def starter():
    return load_policy(SETTINGS, torch.device("cpu"))


FEW = [
    FEWER,
    {**FEWER, "beta": 0.0, "num_inner_updates": 1, "loss_average": "token"},
    {**FEWER, "ratio": "sequence", "epsilon": 1e-3, "loss_average": "constant"},
]
ALL = [
    {},
    {"beta": 0.0},
    {"num_inner_updates": 1},
    {"shots": 2},
    {"loss_average": "token"},
    {"loss_average": "constant"},
    {"ratio": "sequence", "epsilon": 1e-3},
    {"scale_rewards": "none", "temperature": 0.7},
    {"epsilon_high": 0.28, "clip_grad_norm": 0.05},
]


@pytest.mark.parametrize(
    "changes", [*FEW, *(pytest.param(changes, marks=pytest.mark.slow) for changes in ALL)], ids=str
)
def test_plain_and_fast_loop_draw_the_same_completions_and_reach_the_same_weights(starter, changes):
    config = replace(SETTINGS, **changes)
    start = {name: p.detach().clone() for name, p in starter.model.named_parameters()}
    models = [replace(starter, model=copy.deepcopy(starter.model)) for _ in range(2)]
    task = make_task(config)
    completions = plain.train(models[0], task, config, STEPS)
    fast = GRPO(config, task, models[1])
    for step in range(1, STEPS + 1):
        rollout = fast.step(step).rollout
        rows = zip(rollout.tokens.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)
        assert [each.ids for each in completions[step - 1]] == [ids[:n] for ids, n in rows]
        advantages = torch.stack([each.advantage for each in completions[step - 1]])
        torch.testing.assert_close(advantages, rollout.advantages)
    plain_weights = dict(models[0].model.named_parameters())
    for name, weight in models[1].model.named_parameters():
        assert (weight - plain_weights[name]).abs().max() < SAME, name
    moved = max(float((plain_weights[name].detach() - start[name]).abs().max()) for name in start)
    assert moved > 2e-6, "or it would prove nothing"
