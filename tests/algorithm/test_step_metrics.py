"""Metrics of a step that findings are made from, by hand: the spread of a reward part, the sampler's gap."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo.algorithm.grpo import sampler_gap
from grpo.algorithm.step_metrics import STEP_METRICS, _spread
from tasks.base import Problem

OF_TASKS = ("groups", "accuracy", "reward_mean", "tied_groups", "tied_all_right", "tied_all_wrong")


def test_the_spread_of_a_part_is_that_of_the_groups_where_it_differs():
    # Groups of 2: (0, 1) has a standard deviation of sqrt(1/2), (1, 1) none, in (None, 2) there is one value only.
    assert _spread([0.0, 1.0, 1.0, 1.0, None, 2.0], 3) == pytest.approx(math.sqrt(0.5))
    assert _spread([1.0] * 6, 3) is None


def test_the_sampler_gap_is_the_largest_of_the_tokens_of_completions():
    sampled, scored = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.25]])

    def gap(mask):
        tokens = SimpleNamespace(completion_mask=torch.tensor([mask]))
        batch = SimpleNamespace(sizes=SimpleNamespace(num_completions=1), old_logprobs=scored, tokens=tokens)
        return sampler_gap(SimpleNamespace(sample_logprobs=sampled), batch)

    assert gap([True, True]) == 0.5
    assert gap([False, True]) == 0.25
    assert gap([False, False]) == 0.0


def test_figures_by_task_are_means_over_its_groups_by_hand():
    problems = [Problem("q", "1", task=task) for task in ("a", "b", "b")]
    rollout = SimpleNamespace(
        problems=problems,
        totals=torch.tensor([[1.0, 0.0], [0.5, math.nan], [1.0, 1.0]], dtype=torch.float64),
        correct=torch.tensor([[True, False], [False, False], [True, True]]),
        tied=torch.tensor([False, True, True]),
    )
    config = SimpleNamespace(task=("x.py:a=1", "x.py:b=2", "reverse=1"))
    families = {f"{name}{more}/*" for name in OF_TASKS for more in ("", "_fraction")}
    by_task = {metric.name: metric.formula for metric in STEP_METRICS if metric.name in families}
    found = {name: formula(SimpleNamespace(rollout=rollout, config=config)) for name, formula in by_task.items()}
    assert found == {
        "groups/*": {"a": 1, "b": 2, "reverse": 0},
        "accuracy/*": {"a": 0.5, "b": 0.5, "reverse": None},
        "reward_mean/*": {"a": 0.5, "b": pytest.approx(2.5 / 3), "reverse": None},
        "tied_groups_fraction/*": {"a": 0.0, "b": 1.0, "reverse": None},
        "tied_all_right_fraction/*": {"a": 0.0, "b": 0.5, "reverse": None},
        "tied_all_wrong_fraction/*": {"a": 0.0, "b": 0.5, "reverse": None},
    }
    alone = SimpleNamespace(rollout=rollout, config=SimpleNamespace(task=("reverse",)))
    assert [formula(alone) for formula in by_task.values()] == [{}] * len(found)
