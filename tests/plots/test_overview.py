"""The overview: every panel with its unit, findings as numbered lines and words."""

import re

from matplotlib.figure import Figure

from grpo.plots import panels
from grpo.plots.figures import MOST_FINDINGS, overview
from grpo.plots.panels import PANELS
from tests.helpers.records import FINDINGS, a_full_record


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


def test_a_panel_that_some_runs_have_is_drawn_for_them_only():
    record = a_full_record(60, [])
    assert [title for title, _ in panels.panels_of(record)] == [title for title, _ in PANELS]
    of_task = {"accuracy": 0.5, "n": 10, "ci_low": 0.2, "ci_high": 0.8}
    for row in record["steps"]:
        row |= {"accuracy/reverse": None if row["step"] % 3 else 0.25, "accuracy/_sums": 0.5, "level": 0.5}
    for entry in record["evals"]:
        entry["tasks"] = {"reverse": of_task}
    figure = overview(record)
    assert len(figure.axes) == len(PANELS) + 2
    assert [title for title in titles(figure) if title.startswith(("Accuracy by", "Curriculum"))] == [
        "Accuracy by task (% of completions), dots: validation",
        "Curriculum: level drawn (0 solved most, 1 least)",
    ]
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Accuracy by")]
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == ["reverse", "_sums"]
    assert any(list(line.get_ydata()) == [0.5] * len(line.get_xdata()) for line in axes.lines)


def test_saving_which_follows_a_step_takes_nothing_from_its_other_time(monkeypatch):
    drawn = {}
    monkeypatch.setattr(panels, "_stack", lambda axes, record, layers: drawn.update({x[0]: x[1] for x in layers}))
    times = {"time/sample": 0.5, "time/save": 0.25, "time/total": 1.0}
    figure = Figure()
    panels._time(figure.add_subplot(), {"steps": [{"step": 1, **times}], "evals": [], "config": {}})
    assert drawn["other"].tolist() == [0.5]
