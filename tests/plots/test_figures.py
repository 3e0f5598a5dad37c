"""The figures of a run: drawn whole and with the right numbers for every record that a run can leave behind."""

import json
import struct
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest

from grpo.plots.figures import CURVE, KL, OVERVIEW, draw_all, kl_divergence, overview, training_curve
from grpo.plots.series import SMOOTHED_FROM, smooth, window_for
from grpo.record.metrics import Metrics, load_metrics
from tests.helpers.records import EVALS, FINDINGS, TESTS, a_full_record, a_record, an_evaluation

# 8 × 6.4 and 8 × 3.8 inches at 150 dots an inch. The overview is 8.8 inches wide; its height depends on its findings.
PIXELS = {CURVE: (1200, 960), KL: (1200, 570), OVERVIEW: (1320, ...)}

RECORDS = {
    "every metric": a_full_record(300, FINDINGS),
    "every metric of 5 steps": a_full_record(5, FINDINGS),
    "many findings": a_full_record(60, FINDINGS * 9),
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
    "as few steps as are smoothed": a_record(SMOOTHED_FROM),
    "300 steps": a_record(300),
    "a whole run": a_record(300, [TESTS[0], *EVALS, TESTS[1]]),
    "accuracies of 0 and 1": a_record(2, [an_evaluation(0, 0.0), an_evaluation(2, 1.0, n=1)]),
    "a config without names": {**a_record(2), "config": {}},
}


def check_files(folder):
    """Check that the folder has the three figures and nothing else, as PNGs of the right size."""
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
        assert plt.imread(folder / name).std() > 0.01  # the picture is not empty


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_all_figures_are_drawn_for_whatever_a_run_leaves_behind(tmp_path, record):
    for name in PIXELS:
        (tmp_path / name).write_text("an old figure", encoding="utf-8")
    before = json.dumps(record)
    written = draw_all(record, tmp_path)
    assert json.dumps(record) == before
    assert sorted(path.name for path in written) == sorted(PIXELS)
    check_files(tmp_path)
    assert plt.get_fignums() == []  # Open figures would fill the memory of a notebook that draws often.


def test_without_a_reference_no_kl_is_drawn(tmp_path):
    record = a_record(60, EVALS[:2], beta=0)
    for row in record["steps"]:
        row["kl"] = None
    assert (
        {path.name for path in draw_all(record, tmp_path)}
        == {path.name for path in tmp_path.iterdir()}
        == {CURVE, OVERVIEW}
    )
    assert not [axes for axes in overview(record).axes if "KL" in axes.get_title(loc="left")]


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


def test_the_record_of_a_run_that_continues_or_was_killed_is_drawn(tmp_path):
    # The record of a killed run has one test, and steps without an evaluation after them.
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
    # matplotlib reads $...$ as mathematics and raises an error if it is not: at the end of a run, after hours.
    draw_all(a_record(2, EVALS[:1], model=model), tmp_path)
    check_files(tmp_path)


def test_the_curves_show_the_numbers_of_the_record():
    record = a_record(5, [TESTS[0], *EVALS, TESTS[1]])
    figure = training_curve(record)
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_xydata()[:, 1], [0.501, 0.502, 0.503, 0.504, 0.505])
    np.testing.assert_allclose(bottom.lines[0].get_xydata()[:, 1], [0.301, 0.302, 0.303, 0.304, 0.305])
    drawn = [line.get_xydata().tolist() for line in bottom.lines]
    assert [[0, 0.3], [50, 0.5], [300, 0.97]] in drawn  # validation, not test
    assert [[300, 1.0]] in drawn  # the test of the saved model only
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


def test_a_spike_makes_the_scale_logarithmic_and_the_title_says_so():
    axes = kl_divergence(RECORDS["a spike"]).axes[0]
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("symlog", 0)
    assert "log above 0.01" in axes.get_ylabel()
    assert axes.lines[1].get_ydata().max() < 1  # smoothed on the logarithmic scale, a spike makes no hill
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
