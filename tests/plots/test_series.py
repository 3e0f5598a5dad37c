"""The series behind the figures: smoothing, columns, findings by step, several runs as one."""

from pathlib import Path

import numpy as np
import pytest

from grpo.plots.series import column, findings, group_runs, over_runs, smooth, window_for
from tests.helpers.records import FINDINGS, a_record


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        # Window 3: the weights are 1 in the middle and (1 - (1/2)³)³ = 343/512 beside it. Inside, the fitted value is
        # the weighted mean: at 2 it is (343/512 · (1 + 6) + 2) / (1 + 2 · 343/512) = 3425/1198. At an end, the line
        # goes through both points.
        ([1.0, 2.0, 6.0, 4.0, 12.0], 3, [1.0, 3425 / 1198, 5130 / 1198, 8222 / 1198, 12.0]),
        ([1.0, 2.0, 6.0, 4.0, 12.0], 1, [1.0, 2.0, 6.0, 4.0, 12.0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 5, [1.0, 2.0, 3.0, 4.0, 5.0]),  # a straight line is unchanged, also at the ends
        ([3.0, 3.0, 3.0, 3.0], 3, [3.0] * 4),
        ([7.0], 9, [7.0]),
        ([], 9, []),
        ([1.0, np.nan, 3.0, 4.0], 5, [1.0, np.nan, 3.0, 4.0]),  # a gap stays a gap and does not count as 0
        ([np.nan, np.nan, np.nan, 4.0], 3, [np.nan, np.nan, np.nan, 4.0]),
        ([np.nan, np.nan], 3, [np.nan, np.nan]),
        ([1.0, np.inf, 3.0], 5, [1.0, np.nan, 3.0]),
    ],
)
def test_smoothing_by_hand(values, window, expected):
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12)


def test_smoothing_is_centred():
    # A smoothed spike is symmetric, so that a rise does not appear later than it was.
    spike = np.zeros(41)
    spike[20] = 1.0
    smoothed = smooth(spike, 5)
    np.testing.assert_allclose(smoothed, smoothed[::-1], atol=1e-15)
    assert smoothed.argmax() == 20
    assert smoothed[:18].max() == 0


def test_smoothing_does_not_lie_at_the_ends():
    # On a noisy straight line that rises, a moving average with a shortened window begins too high and ends too low,
    # by a quarter of its window. The fitted line does not.
    steps = np.arange(200)
    noise = np.random.default_rng(0).normal(0, 0.01, (500, 200))
    smoothed = np.array([smooth(0.01 * steps + row, 41) for row in noise]).mean(axis=0)
    assert np.abs(smoothed - 0.01 * steps).max() < 0.01  # a quarter of the window would be 0.1


def test_a_smoothed_share_stays_a_share():
    values = 1 - np.exp(-np.arange(60) / 5)
    values[30:] = 1.0
    assert smooth(values, 21).max() <= 1.0
    assert window_for(80) % 2 == window_for(10_000) % 2 == 1


def test_a_column_has_nan_where_a_value_is_null_or_missing():
    record = {"steps": [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3}]}
    np.testing.assert_array_equal(column(record, "kl"), [0.5, np.nan, np.nan])
    assert column({"steps": []}, "kl").shape == (0,)


def test_findings_come_in_the_order_of_their_steps():
    assert [f["name"] for f in findings({"findings": FINDINGS[::-1]})] == ["spike", "near", "normal"]
    assert findings({}) == []


def test_the_mean_and_range_of_runs_of_different_lengths():
    first = (np.array([1, 2, 3]), np.array([1.0, 2.0, np.nan]))
    second = (np.array([1, 2, 3, 4]), np.array([3.0, 2.0, 5.0, 6.0]))
    spread = over_runs([first, second])
    np.testing.assert_array_equal(spread.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(spread.mean, [2.0, 2.0, 5.0, 6.0])
    np.testing.assert_array_equal(spread.low, [1.0, 2.0, 5.0, 6.0])
    np.testing.assert_array_equal(spread.high, [3.0, 2.0, 5.0, 6.0])
    np.testing.assert_array_equal(spread.runs, [2, 2, 1, 1])


def test_runs_are_grouped_by_label_or_by_their_settings_without_the_seed():
    records = [a_record(9, seed=0), a_record(9, seed=1), a_record(9, seed=0, learning_rate=1e-3)]
    records[1]["config"]["output_dir"] = "elsewhere"  # has no effect on what is learned
    paths = [Path("runs/a"), Path("runs/b"), Path("runs/c")]
    groups = group_runs(paths, records, ["x", "y", "x"])
    assert [(g.label, g.seeds) for g in groups] == [("x", [0, 0]), ("y", [1])]
    groups = group_runs(paths, records, [])
    alone = f"{Path('runs/c')}, learning_rate 0.001"
    assert [(g.label, g.seeds) for g in groups] == [("learning_rate 1e-07", [0, 1]), (alone, [0])]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "precision": ("float32", "bfloat16"),
        "num_iterations": (60, 80),
        "patience": (0, 3),
        "target_accuracy": (0.0, 0.9),
    }.items(),
)
def test_runs_of_other_precision_or_length_are_not_averaged(name, values):
    records = [a_record(9, seed=seed, **{name: value}) for seed, value in enumerate(values)]
    groups = group_runs([Path("a"), Path("b")], records, [])
    assert [(g.label, g.seeds) for g in groups] == [(f"a, {name} {values[0]}", [0]), (f"b, {name} {values[1]}", [1])]


def test_the_precision_of_a_run_is_the_one_that_auto_chose():
    records = [{**a_record(9, seed=seed), "environment": {"precision": "float32"}} for seed in range(3)]
    records[1]["config"]["precision"] = "float32"
    records[2]["environment"]["precision"] = "bfloat16"
    groups = group_runs([Path("a"), Path("b"), Path("c")], records, [])
    assert [(g.label, g.seeds) for g in groups] == [("precision float32", [0, 1]), ("c, precision bfloat16", [2])]
    records[2]["environment"] = ["damaged"]
    assert group_runs([Path("a"), Path("b"), Path("c")], records, [])[1].label == "c, precision auto"


def test_runs_of_the_same_seed_and_settings_are_not_averaged():
    records = [a_record(9, seed=seed) for seed in (0, 1, 0)]
    groups = group_runs([Path("a"), Path("b"), Path("c")], records, [])
    assert [(g.label, g.seeds) for g in groups] == [("a", [0]), ("b", [1]), ("c", [0])]
