"""The comparison: runs of all lengths in one picture, with mean and range of runs that differ only by seed."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from grpo.plots.comparison import comparison, draw_comparison
from grpo.plots.series import group_runs
from grpo.plots.style import COLOURS
from tests.helpers.records import EVALS, FINDINGS, a_full_record, a_record

MANY = [a_record(0), a_record(1, EVALS[:1]), a_record(300, EVALS), a_full_record(40, FINDINGS)]


@pytest.mark.parametrize("labels", [[], ["a"] * 4, ["_a", "$b$", "c" * 200, "日本\x1b"]], ids=["none", "one", "four"])
def test_runs_of_all_lengths_are_compared_in_one_picture(tmp_path, labels):
    groups = group_runs([Path(f"runs/{i}") for i in range(4)], MANY, labels)
    assert [path.name for path in draw_comparison(groups, tmp_path)] == ["grpo_comparison.png"]
    assert plt.get_fignums() == []


def test_the_comparison_shows_mean_and_range_and_says_so():
    evals = [{name: value for name, value in entry.items() if name != "drift"} for entry in EVALS]
    records = [a_record(5, evals, seed=seed) for seed in (0, 1)]
    for row in records[1]["steps"]:
        row["kl"] += 0.2
    figure = comparison(group_runs([Path("a"), Path("b")], records, []))
    shown = [axes.get_title(loc="left").partition(" (")[0] for axes in figure.axes]
    assert shown == [
        "Reward",
        "Validation accuracy",
        "Accuracy, sampled",
        "KL to the reference",
    ]  # empty panels are left out
    assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False, False, True, True]
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("KL")]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.1001, 0.1002, 0.1003, 0.1004, 0.1005])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [1e-4, 0.2005])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [" starter: 2 runs, mean and min to max, seeds 0, 1, 5 steps"]
    assert axes.lines[0].get_color() == COLOURS[0]
