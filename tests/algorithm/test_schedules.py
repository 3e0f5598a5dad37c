"""Schedules, against numbers worked out by hand."""

import math

import pytest

from grpo.algorithm.schedules import adapted_beta, group_size_at, learning_rate_at
from grpo.config import parse_group_schedule


def test_warm_up_rises_in_equal_steps_to_the_value_and_stays():
    rates = [learning_rate_at(step, 10, 8.0, 4, "none") for step in range(1, 11)]
    assert rates == [2.0, 4.0, 6.0, 8.0] + [8.0] * 6


def test_linear_decay_ends_one_step_away_from_zero():
    # 2 steps of warm-up, 4 of decay: 8 · (1 − 0/4), (1 − 1/4), …
    assert [learning_rate_at(step, 6, 8.0, 2, "linear") for step in range(1, 7)] == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]


def test_cosine_decay_is_half_way_down_in_the_middle():
    rates = [learning_rate_at(step, 4, 1.0, 0, "cosine") for step in range(1, 5)]
    assert rates == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_the_group_shrinks_evenly_from_first_to_last():
    assert [group_size_at(step, 5, 8, 4) for step in range(1, 6)] == [8, 7, 6, 5, 4]
    assert [group_size_at(step, 3, 4, 8) for step in range(1, 4)] == [4, 6, 8]
    assert group_size_at(1, 1, 8, 4) == 8


def test_a_group_schedule_is_two_numbers_of_at_least_two():
    assert parse_group_schedule("8:4") == (8, 4)
    for text in ("8", "8:", ":4", "8:1", "a:b", "8:4:2", "-8:4", "8 :4", "٨:٤", "8:" + "9" * 5000):
        with pytest.raises(ValueError, match="8:4"):
            parse_group_schedule(text)


def test_beta_follows_the_kl_by_hand():
    # clip(0.3/0.2 − 1) = 0.2 (0.5 clipped): 1 · (1 + 0.1 · 0.2); 0.22: 1 + 0.1 · 0.1; 0.0: 1 − 0.1 · 0.2
    assert adapted_beta(1.0, 0.3, 0.2) == pytest.approx(1.02)
    assert adapted_beta(1.0, 0.22, 0.2) == pytest.approx(1.01)
    assert adapted_beta(1.0, 0.0, 0.2) == pytest.approx(0.98)
    assert adapted_beta(1.0, math.nan, 0.2) == 1.0
    assert adapted_beta(1e3, 5.0, 0.2) == 1e3
