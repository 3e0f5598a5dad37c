"""The figures: drawn for every record a run can leave behind, whole, and from the right numbers."""

import json
import re
import struct
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from grpo.comparison import PANELS as COMPARED
from grpo.comparison import comparison, draw_comparison
from grpo.curves import column, findings, group_runs, over_runs, smooth, window_for
from grpo.drawing import COLOURS, from_zero
from grpo.metrics import Metrics, load_metrics
from grpo.overview import MOST_FINDINGS, overview
from grpo.panels import PANELS
from grpo.plots import CURVE, KL, OVERVIEW, draw_all, kl_divergence, training_curve

# 8 × 6.4 and 8 × 3.8 inches at 150 dots an inch; the overview is 8.8 inches wide and as high as its findings need
PIXELS = {CURVE: (1200, 960), KL: (1200, 570), OVERVIEW: (1320, ...)}


@pytest.fixture(autouse=True)
def _strict():
    """A warning of matplotlib or numpy (empty axes, a missing glyph) is a failure; figures are closed after use."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def an_evaluation(step, accuracy, split="validation", n=500):
    return {
        "step": step,
        "split": split,
        "accuracy": accuracy,
        "n": n,
        "ci_low": max(0.0, accuracy - 0.04),
        "ci_high": min(1.0, accuracy + 0.04),
        "well_formed": 1.0,
    }


def a_record(steps, evals=(), **config):
    """A record of so many steps whose values rise slowly."""
    return {
        "config": {"model": "starter", "seed": 0, "beta": 0.04, **config},
        "steps": [
            {"step": i, "reward_mean": 0.5 + 0.001 * i, "accuracy": 0.3 + 0.001 * i, "kl": 1e-4 * i}
            for i in range(1, steps + 1)
        ],
        "evals": list(evals),
    }


def check_files(folder):
    """Both figures are there, nothing else is, and they are PNGs of the size that they should have."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(PIXELS)
    for name, size in PIXELS.items():
        content = (folder / name).read_bytes()
        # A PNG begins with its signature and the chunk IHDR, whose first two numbers are width and height, and
        # ends with the chunk IEND.
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert content[12:16] == b"IHDR"
        width, height = struct.unpack(">II", content[16:24])
        assert (width, ... if size[1] is ... else height) == size
        assert content[-8:-4] == b"IEND"
        assert plt.imread(folder / name).std() > 0.01  # something is drawn


# --- smoothing ---


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        # Window 3: weights (1 - (1/2)³)³ = 343/512 beside 1; inside, the fit is the weighted mean: at 2,
        # (343/512 · (1 + 6) + 2) / (1 + 2 · 343/512) = 3425/1198; at an end two points give a line through both.
        ([1.0, 2.0, 6.0, 4.0, 12.0], 3, [1.0, 3425 / 1198, 5130 / 1198, 8222 / 1198, 12.0]),
        ([1.0, 2.0, 6.0, 4.0, 12.0], 1, [1.0, 2.0, 6.0, 4.0, 12.0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 5, [1.0, 2.0, 3.0, 4.0, 5.0]),  # a line stays one, at the ends too
        ([3.0, 3.0, 3.0, 3.0], 3, [3.0] * 4),
        ([7.0], 9, [7.0]),
        ([], 9, []),
        ([1.0, np.nan, 3.0, 4.0], 5, [1.0, np.nan, 3.0, 4.0]),  # a gap stays one, and is not taken as 0
        ([np.nan, np.nan, np.nan, 4.0], 3, [np.nan, np.nan, np.nan, 4.0]),
        ([np.nan, np.nan], 3, [np.nan, np.nan]),
        ([1.0, np.inf, 3.0], 5, [1.0, np.nan, 3.0]),
    ],
)
def test_smoothing_by_hand(values, window, expected):
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12)


def test_smoothing_is_centred():
    # A rise at one place must not appear later than it was: a smoothed spike is symmetric about it.
    spike = np.zeros(41)
    spike[20] = 1.0
    smoothed = smooth(spike, 5)
    np.testing.assert_allclose(smoothed, smoothed[::-1], atol=1e-15)
    assert smoothed.argmax() == 20
    assert smoothed[:18].max() == 0


def test_smoothing_does_not_lie_at_the_ends():
    # Of a curve that rises in a straight line under noise, a shortened moving average begins too high and ends too
    # low, by a quarter of its window; the fitted line does not.
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


# --- files ---

EVALS = [an_evaluation(0, 0.3), an_evaluation(50, 0.5), an_evaluation(300, 0.97)]
TESTS = [an_evaluation(0, 0.31, "test", 829), an_evaluation(300, 1.0, "test", 829)]
FINDINGS = [
    {"name": "spike", "step": 40, "text": "The gradient norm was 80: $x^2$ <b>, lower it. " * 9},
    {"name": "near", "step": 41, "text": "Updates were skipped."},
    {"name": "normal", "step": None, "text": "A loss near 0 is normal."},
]
DAMAGED = [None, 5, {"name": "x"}, {"step": 3, "text": 4}, {"step": "3", "text": "three"}]
FULL = {
    "reward/exact": 0.4,
    "reward/of $mine$": -0.5,
    "reward/_hidden": None,
    "entropy": 0.3,
    "clip_fraction": 0.01,
    "ratio_max": 30.0,
    "completion_length": 12.0,
    "truncated_fraction": 0.5,
    "grad_norm": 2.0,
    "loss": -0.01,
    "tied_groups_fraction": 0.5,
    "tied_all_right_fraction": 0.25,
    "tied_all_wrong_fraction": 0.25,
    "time/sample": 0.1,
    "time/reward": 0.1,
    "time/reward/exact": 0.05,
    "time/save": 0.1,
    "time/total": 0.5,
}


def a_full_record(steps, found=(), **more):
    """A record with every metric of today."""
    record = a_record(steps, [TESTS[0], *EVALS, TESTS[1]])
    skill = {"accuracy": 0.9, "n": 300, "ci_low": 0.85, "ci_high": 0.93, "well_formed": 1.0}
    for row in record["evals"]:
        row.update(drift=0.001 * row["step"], skills={"letters": skill, "single $": skill})
    record["steps"] = [{**row, **FULL} for row in record["steps"]]
    return {**record, "findings": list(found), **more}


def with_steps(row):
    """A record of 30 steps that are all the same."""
    return {**a_record(0), "steps": [{"step": i, **row} for i in range(1, 31)]}


RECORDS = {
    "every metric": a_full_record(300, FINDINGS),
    "every metric of 5 steps": a_full_record(5, FINDINGS),
    "many findings": a_full_record(60, FINDINGS * 9),
    "damaged findings": a_record(20) | {"findings": DAMAGED},
    "findings that are no list": a_record(20) | {"findings": 5},
    "a spike": {**a_record(30), "steps": [{"step": i, "kl": 2072.0 if i == 9 else 0.01} for i in range(1, 31)]},
    "numbers beyond any scale": {
        **a_record(0),
        "steps": [{"step": i, "kl": 1e299, "loss": -1e299, "reward_mean": 1e299} for i in range(1, 31)],
    },
    "a reward of many parts": {
        **a_record(0),
        "steps": [{"step": i, **{f"reward/part {n}": n for n in range(15)}} for i in range(1, 31)],
    },
    "nothing yet": a_record(0),
    "the start measured": a_record(0, [TESTS[0], EVALS[0]]),
    "one step": a_record(1),
    "two steps": a_record(2, EVALS[:1]),
    "60 steps": a_record(60, EVALS[:2], beta=0),  # the first number of steps that is smoothed
    "300 steps": a_record(300),
    "a whole run": a_record(300, [TESTS[0], *EVALS, TESTS[1]]),
    "accuracies of 0 and 1": a_record(2, [an_evaluation(0, 0.0), an_evaluation(2, 1.0, n=1)]),
    "a config without names": {**a_record(2), "config": {}},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_all_figures_are_drawn_for_whatever_a_run_leaves_behind(tmp_path, record):
    written = draw_all(record, tmp_path)
    assert sorted(path.name for path in written) == sorted(PIXELS)
    check_files(tmp_path)
    assert plt.get_fignums() == []  # a notebook that draws often must not run out of memory


@pytest.mark.parametrize(
    ("steps", "which"),
    [(1, "all"), (2, "first"), (300, "all"), (300, "missing"), (300, "every other")],
)
def test_nulls_leave_gaps(tmp_path, steps, which):
    record = a_record(steps, [an_evaluation(0, 0.3)])
    rows = record["steps"]
    chosen = {"first": rows[:1], "every other": rows[::2]}
    for row in chosen.get(which, rows):
        for name in ("reward_mean", "accuracy", "kl"):
            if which == "missing":
                del row[name]
            else:
                row[name] = None
    draw_all(record, tmp_path)
    check_files(tmp_path)


def test_drawing_again_replaces_the_old_figures(tmp_path):
    for name in PIXELS:
        (tmp_path / name).write_text("old", encoding="utf-8")
    draw_all(a_record(2), tmp_path)
    check_files(tmp_path)


def test_the_record_of_a_run_that_goes_on_or_was_killed_is_drawn(tmp_path):
    # As the file is at that moment: read back from disk, steps without a last evaluation, test measured once.
    metrics = Metrics(tmp_path, {"model": "starter", "seed": 0, "beta": 0.04}, {})
    metrics.add_eval(an_evaluation(0, 0.3, "test"))
    metrics.add_eval(an_evaluation(0, 0.3))
    for row in a_record(7)["steps"]:
        metrics.add_step({**row, "kl": float("nan") if row["step"] == 4 else row["kl"]})
    metrics.write()
    figures = tmp_path / "figures"
    figures.mkdir()
    draw_all(load_metrics(tmp_path), figures)
    check_files(figures)


@pytest.mark.parametrize("model", ["a$^$b", r"$\frac{$_%s{0}", "x" * 300])
def test_the_name_of_a_model_is_shown_as_it_is(tmp_path, model):
    # matplotlib reads $...$ as mathematics, and raises where it is none: at the end of a run, after hours.
    draw_all(a_record(2, EVALS[:1], model=model), tmp_path)
    check_files(tmp_path)


# --- what is in the figures ---


def test_the_curves_show_the_numbers_of_the_record():
    record = a_record(5, [TESTS[0], *EVALS, TESTS[1]])
    figure = training_curve(record)
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_xydata()[:, 1], [0.501, 0.502, 0.503, 0.504, 0.505])
    np.testing.assert_allclose(bottom.lines[0].get_xydata()[:, 1], [0.301, 0.302, 0.303, 0.304, 0.305])
    drawn = [line.get_xydata().tolist() for line in bottom.lines]
    assert [[0, 0.3], [50, 0.5], [300, 0.97]] in drawn  # validation, not test
    assert [[300, 1.0]] in drawn  # test, of the saved model only
    axes = kl_divergence(record).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata()[:, 1], [1e-4, 2e-4, 3e-4, 4e-4, 5e-4])


def test_every_axis_is_labelled_with_its_unit_and_zero_is_in_the_picture():
    record = a_record(300, EVALS)
    figure = training_curve(record)
    for axes in (*figure.axes, *kl_divergence(record).axes):
        assert axes.get_ylabel()
        assert "(" in axes.get_ylabel()
        assert axes.get_ylim()[0] == 0  # a cut axis makes a small gain look large
        assert axes.get_legend() is not None
    assert figure.axes[-1].get_xlabel() == "step"
    assert figure.axes[1].get_ylim()[1] >= 1.0  # accuracy


def test_a_long_run_is_drawn_raw_and_smoothed():
    axes = kl_divergence(a_record(300)).axes[0]
    raw, smoothed = axes.lines[:2]
    assert raw.get_alpha() < 0.5
    np.testing.assert_allclose(smoothed.get_ydata(), smooth(raw.get_ydata(), window_for(300)))


def test_an_interval_is_as_wide_as_the_record_says():
    bottom = training_curve(a_record(2, [an_evaluation(1, 0.5)])).axes[1]
    (bars,) = [segments for c in bottom.collections if len(segments := c.get_segments())]
    np.testing.assert_allclose(bars[0], [[1, 0.46], [1, 0.54]])


def test_drawing_does_not_change_the_record(tmp_path):
    record = a_record(300, [TESTS[0], *EVALS, TESTS[1]])
    before = json.dumps(record)
    draw_all(record, tmp_path)
    assert json.dumps(record) == before


# --- the overview ---


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_the_overview_has_every_panel_with_its_unit_on_one_axis_of_steps():
    figure = overview(a_full_record(300, FINDINGS))
    assert len(figure.axes) == len(PANELS)
    for title in titles(figure):
        assert re.search(r"\(.+\)|norm|policy", title), title
    ranges = {axes.get_xlim() for axes in figure.axes[:-1]}  # the last is of skills, not of steps
    assert len(ranges) == 1
    for axes in figure.axes[:-1]:
        if "Loss" not in axes.get_title(loc="left") and "Ratio" not in axes.get_title(loc="left"):
            assert axes.get_ylim()[0] <= 0


def test_findings_are_numbered_lines_and_words():
    figure = overview(a_full_record(300, FINDINGS))
    for axes in figure.axes[:-1]:
        dashed = [line for line in axes.lines if set(line.get_xdata()) in ({40}, {41})]
        assert len(dashed) == 2
        assert [text.get_text() for text in axes.texts] == ["1–2"]  # too close for a marker each
    words = " ".join(text.get_text() for text in figure.texts)
    assert "1  step 40: The gradient norm" in words
    assert r"\$x^2\$" in words  # shown as it is, not as mathematics
    assert "3  A loss near 0" in words
    many = overview(a_full_record(60, FINDINGS * 9))
    assert f"{27 - MOST_FINDINGS} more" in many.texts[-1].get_text()


def test_findings_come_by_step_and_damaged_ones_not_at_all():
    assert [f["name"] for f in findings({"findings": [*FINDINGS[::-1], *DAMAGED[:4]]})] == ["spike", "near", "normal"]
    assert findings({}) == findings({"findings": None}) == findings({"findings": 5}) == []


def test_a_spike_makes_the_scale_logarithmic_and_the_title_says_so():
    axes = kl_divergence(RECORDS["a spike"]).axes[0]
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("symlog", 0)
    assert "log above 0.01" in axes.get_ylabel()
    assert axes.lines[1].get_ydata().max() < 1  # smoothed on that scale, one spike is no hill
    assert kl_divergence(a_record(300)).axes[0].get_yscale() == "linear"


def test_a_reward_beyond_1_or_below_0_is_in_the_picture():
    record = a_record(20)
    record["steps"][3]["reward_mean"], record["steps"][4]["reward_mean"] = 3.0, -2.0
    for axes in (training_curve(record).axes[0], overview(record).axes[0]):
        low, high = axes.get_ylim()
        assert low <= -2
        assert high >= 3


def test_a_value_between_two_gaps_is_visible():
    record = a_record(30)
    for row in record["steps"][::2]:
        row["kl"] = None
    axes = kl_divergence(record).axes[0]
    alone = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert len(alone[0].get_xdata()) == 15


def test_ten_thousand_steps_are_drawn_in_seconds(tmp_path):
    record = a_full_record(10_000, FINDINGS)
    start = time.process_time()
    draw_all(record, tmp_path)
    assert time.process_time() - start < 15  # 2 s on the machine this was written on


# --- several runs ---


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
    records[1]["config"]["output_dir"] = "elsewhere"  # decides nothing about what is learned
    paths = [Path("runs/a"), Path("runs/b"), Path("runs/c")]
    groups = group_runs(paths, records, ["x", "y", "x"])
    assert [(g.label, g.seeds) for g in groups] == [("x", [0, 0]), ("y", [1])]
    groups = group_runs(paths, records, [])
    assert [(g.label, g.seeds) for g in groups] == [("learning_rate 1e-07", [0, 1]), (str(Path("runs/c")), [0])]


MANY = [a_record(0), a_record(1, EVALS[:1]), a_record(300, EVALS), a_full_record(40, FINDINGS)]


@pytest.mark.parametrize("labels", [[], ["a"] * 4, ["_a", "$b$", "c" * 200, "日本\x1b"]], ids=["none", "one", "four"])
def test_runs_of_all_lengths_are_compared_in_one_picture(tmp_path, labels):
    groups = group_runs([Path(f"runs/{i}") for i in range(4)], MANY, labels)
    assert [path.name for path in draw_comparison(groups, tmp_path)] == ["grpo_comparison.png"]
    assert plt.get_fignums() == []


def test_the_comparison_shows_mean_and_range_and_says_so():
    records = [a_record(5, EVALS, seed=seed) for seed in (0, 1)]
    for row in records[1]["steps"]:
        row["kl"] += 0.2
    figure = comparison(group_runs([Path("a"), Path("b")], records, []))
    assert len(figure.axes) == len(COMPARED)
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("KL")]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.1001, 0.1002, 0.1003, 0.1004, 0.1005])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [1e-4, 0.2005])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [" starter: 2 runs, mean and min to max, seeds 0, 1, 5 steps"]
    assert axes.lines[0].get_color() == COLOURS[0]


def test_an_axis_shows_values_below_zero_too():
    # drift is an estimate, and may be negative
    axes = plt.figure().subplots()
    from_zero(axes, np.array([0.0, -0.002, np.nan, 0.01]))
    low, high = axes.get_ylim()
    assert low < -0.002
    assert high > 0.01
    from_zero(axes, np.array([0.0, 0.01]))
    assert axes.get_ylim()[0] == 0
    plt.close(axes.figure)
