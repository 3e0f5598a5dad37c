"""Two metrics of a step, computed by hand: the standard deviation of a reward part, and the sampler gap."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo.record.step_metrics import _spread
from grpo.runtime.ranks import ONE
from grpo.step_probe import sampler_gap


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
