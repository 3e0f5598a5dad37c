"""The overview: every panel with its unit; findings as numbered lines with a legend in words."""

import re

import pytest
from matplotlib.figure import Figure

from grpo.plots import figures, panels
from grpo.plots.figures import MOST_FINDINGS, overview
from grpo.plots.panels import PANELS
from grpo.record.step_metrics import StepMetric
from tests.helpers.records import FINDINGS, a_full_record, a_record

OF_SOME_RUNS = "Accuracy by category"  # only if there are few categories, such as the tasks of a mixture
OF_ALL_RUNS = [title for title, _ in PANELS if not title.startswith(OF_SOME_RUNS)]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_the_overview_has_every_panel_with_its_unit_on_one_axis_of_steps():
    figure = overview(a_full_record(300, FINDINGS))
    assert len(figure.axes) == len(OF_ALL_RUNS)
    assert not [text for text in figure.texts if "Not drawn" in text.get_text()]
    for title in titles(figure):
        assert re.search(r"\(.+\)|norm|policy", title), title
    ranges = {axes.get_xlim() for axes in figure.axes[:-1]}  # the last panel shows skills, not steps
    assert len(ranges) == 1
    for axes in figure.axes[:-1]:
        if "Loss" not in axes.get_title(loc="left") and "Ratio" not in axes.get_title(loc="left"):
            assert axes.get_ylim()[0] <= 0


def test_an_empty_panel_is_left_out_and_one_that_is_0_throughout_is_named():
    record = a_full_record(60)
    for row in record["steps"]:
        row["truncated_fraction"] = 0.0
        del row["entropy"]
    figure = overview(record)
    assert [title for title in OF_ALL_RUNS if not any(shown.startswith(title) for shown in titles(figure))] == [
        "Entropy (nats a token)",
        "Truncated (% of completions)",
    ]
    [said] = [text.get_text() for text in figure.texts if "Not drawn" in text.get_text()]
    assert said == "Not drawn, because always 0: truncated."
    assert titles(overview(a_record(0))) == ["Reward by part (mean of the step)"]  # with "no steps yet"


@pytest.mark.parametrize("left_out", [[], ["entropy"], ["entropy", "clip_fraction"]])
def test_the_lowest_panel_of_each_column_has_the_numbers_of_the_steps(left_out):
    record = a_full_record(60)
    for row in record["steps"]:
        for name in left_out:
            del row[name]
    panels = [axes for axes in overview(record).axes if "skills" not in axes.get_title(loc="left")]
    columns = {axes.get_position().x0: axes for axes in sorted(panels, key=lambda a: -a.get_position().y0)}
    assert len(columns) == 2
    labelled = [axes for axes in panels if axes.xaxis.get_tick_params()["labelbottom"]]
    assert set(labelled) == set(columns.values()) == {axes for axes in panels if axes.get_xlabel() == "step"}


def test_panels_do_not_overlap_and_have_even_gaps():
    record = a_full_record(60)
    figure = overview(record)
    boxes = [axes.get_position() for axes in figure.axes]
    inches = figure.get_size_inches()[1]
    assert {round(box.height * inches, 3) for box in boxes} == {1.15}
    figure.canvas.draw()
    whole = [axes.get_tightbbox() for axes in figure.axes]
    for i, box in enumerate(whole):
        assert box.x0 >= 0
        assert not any(box.overlaps(other) for other in whole[i + 1 :])


def test_a_metric_of_the_table_that_no_panel_knows_has_one_of_its_own(monkeypatch):
    added = (
        StepMetric("luck", "", lambda s: 0.5, title="Luck", unit="% of problems", scale="share"),
        StepMetric("unnamed", "", lambda s: 0.5),
    )
    monkeypatch.setattr(panels, "STEP_METRICS", (*panels.STEP_METRICS, *added))
    monkeypatch.setattr("grpo.record.step_metrics.STEP_METRICS", panels.STEP_METRICS)
    monkeypatch.setattr(figures, "PANELS", (*PANELS[:2], *panels._of_table()))
    record = a_full_record(60)
    for row in record["steps"]:
        row |= {"luck": 0.5, "unnamed": 1}
    drawn = {axes.get_title(loc="left"): axes for axes in overview(record).axes}
    assert list(drawn)[2:] == ["Luck (% of problems)"]
    assert drawn["Luck (% of problems)"].get_ylim() == (0, 1.05)
    assert len(overview(a_full_record(60)).axes) == 2  # for runs without these metrics


def test_a_legend_names_only_what_is_drawn():
    record = a_full_record(60)
    for row in record["steps"]:
        row |= {"tied_groups_fraction": 0.25, "tied_all_right_fraction": 0.25, "tied_all_wrong_fraction": 0.0}
    [axes] = [axes for axes in overview(record).axes if axes.get_title(loc="left").startswith("Tied")]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["all right"]


def test_findings_are_numbered_lines_and_words():
    figure = overview(a_full_record(300, FINDINGS))
    for axes in figure.axes[:-1]:
        dashed = [line for line in axes.lines if set(line.get_xdata()) in ({40}, {41})]
        assert len(dashed) == 2
        assert [text.get_text() for text in axes.texts] == ["1–2", "3"]  # 1 and 2 are too close for a label each
    words = " ".join(text.get_text() for text in figure.texts)
    assert "1  step 40: The gradient norm" in words
    assert r"\$x^2\$" in words  # shown as text, not as mathematics
    assert "3  step 290: A loss near 0" in words
    many = overview(a_full_record(60, FINDINGS * 9))
    assert f"{27 - MOST_FINDINGS} more" in many.texts[-1].get_text()


def test_a_panel_that_some_runs_have_is_drawn_for_them_only():
    record = a_full_record(60, [])
    before = titles(overview(record))
    assert not [title for title in before if title.startswith("Accuracy by")]
    figures = {"accuracy": 0.5, "n": 10, "ci_low": 0.2, "ci_high": 0.8}
    for entry in record["evals"]:
        entry["categories"] = {"reverse": figures, "_sums": figures}
    figure = overview(record)
    assert len(figure.axes) == len(before) + 1
    assert [title for title in titles(figure) if title.startswith("Accuracy by")] == [
        "Accuracy by category (% of validation problems)"
    ]
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Accuracy by")]
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == ["reverse", "_sums"]
    assert all(list(line.get_ydata()) == [0.5] * 3 for line in axes.lines[:2])
    for entry in record["evals"]:
        entry["categories"] = {str(i): figures for i in range(9)}
    assert titles(overview(record)) == before  # too many for a legend


def test_saving_which_follows_a_step_takes_nothing_from_its_other_time(monkeypatch):
    drawn = {}
    monkeypatch.setattr(panels, "_stack", lambda axes, record, layers: drawn.update({x[0]: x[1] for x in layers}))
    times = {"time/sample": 0.5, "time/save": 0.25, "time/total": 1.0}
    figure = Figure()
    panels._time(figure.add_subplot(), {"steps": [{"step": 1, **times}], "evals": [], "config": {}})
    assert drawn["other"].tolist() == [0.5]
