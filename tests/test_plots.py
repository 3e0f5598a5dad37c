"""The figures: drawn for every record a run can leave behind, whole, and from the right numbers."""

import json
import struct
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest

from grpo.metrics import Metrics, load_metrics
from grpo.plots import CURVE, KL, column, draw_all, kl_divergence, smooth, training_curve

PIXELS = {CURVE: (1200, 960), KL: (1200, 570)}  # 8 × 6.4 and 8 × 3.8 inches at 150 dots an inch


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
        assert struct.unpack(">II", content[16:24]) == size
        assert content[-8:-4] == b"IEND"
        assert plt.imread(folder / name).std() > 0.01  # something is drawn


# --- smoothing ---


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([1.0, 2.0, 6.0, 4.0, 12.0], 3, [1.5, 3.0, 4.0, 22 / 3, 8.0]),  # the ends average two
        ([1.0, 2.0, 6.0, 4.0, 12.0], 1, [1.0, 2.0, 6.0, 4.0, 12.0]),
        ([1.0, 2.0, 6.0, 4.0, 12.0], 5, [3.0, 13 / 4, 5.0, 6.0, 22 / 3]),
        ([1.0, 2.0, 6.0, 4.0, 12.0], 99, [5.0] * 5),  # wider than all: the mean of all
        ([3.0, 3.0, 3.0, 3.0], 3, [3.0] * 4),  # a constant stays one, at the ends too
        ([7.0], 9, [7.0]),
        ([1.0, np.nan, 5.0], 3, [1.0, 3.0, 5.0]),  # left out, not taken as 0
        ([np.nan, np.nan, np.nan, 4.0], 3, [np.nan, np.nan, 4.0, 4.0]),
        ([np.nan, np.nan], 3, [np.nan, np.nan]),
        ([1.0, np.inf, 3.0], 3, [1.0, 2.0, 3.0]),
    ],
)
def test_smoothing_by_hand(values, window, expected):
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12)


def test_smoothing_is_centred():
    # A rise at one place must not appear later than it was: the average of a spike is symmetric about it.
    spike = np.zeros(21)
    spike[10] = 1.0
    smoothed = smooth(spike, 5)
    np.testing.assert_allclose(smoothed, smoothed[::-1])
    np.testing.assert_allclose(smoothed[8:13], 0.2)
    assert smoothed[:8].max() == 0


def test_a_column_has_nan_where_a_value_is_null_or_missing():
    record = {"steps": [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3}]}
    np.testing.assert_array_equal(column(record, "kl"), [0.5, np.nan, np.nan])
    assert column({"steps": []}, "kl").shape == (0,)


# --- files ---

EVALS = [an_evaluation(0, 0.3), an_evaluation(50, 0.5), an_evaluation(300, 0.97)]
TESTS = [an_evaluation(0, 0.31, "test", 829), an_evaluation(300, 1.0, "test", 829)]
RECORDS = {
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
def test_both_figures_are_drawn_for_whatever_a_run_leaves_behind(tmp_path, record):
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
    raw, smoothed = axes.lines
    assert raw.get_alpha() < 0.5
    np.testing.assert_allclose(smoothed.get_ydata(), smooth(raw.get_ydata(), 300 // 20))


def test_an_interval_is_as_wide_as_the_record_says():
    bottom = training_curve(a_record(2, [an_evaluation(1, 0.5)])).axes[1]
    (bars,) = [segments for c in bottom.collections if len(segments := c.get_segments())]
    np.testing.assert_allclose(bars[0], [[1, 0.46], [1, 0.54]])


def test_drawing_does_not_change_the_record(tmp_path):
    record = a_record(300, [TESTS[0], *EVALS, TESTS[1]])
    before = json.dumps(record)
    draw_all(record, tmp_path)
    assert json.dumps(record) == before
