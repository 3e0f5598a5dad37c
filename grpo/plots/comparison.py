"""Several runs in one picture: a curve for each, or one with a band for runs that differ in their seed only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from grpo.plots.series import SMOOTHED_FROM, Group, column, evaluations, over_runs, smooth, window_for
from grpo.plots.style import (
    COLOURS,
    GREY,
    LINE,
    RAW,
    THIN,
    drawable,
    fitting_shares,
    from_zero,
    note,
    plain,
    save_figure,
    smooth_as_drawn,
    tidy,
    whole_steps,
)
from grpo.record.step_metrics import STEP_METRICS, metric_title

COMPARISON = "grpo_comparison.png"
WIDTH, ROW, FOOT, TEXT_LINE = 8.8, 1.55, 0.45, 0.19  # inches
SMALL, TEXT, LARGE = 7.5, 8.5, 11  # points
LONGEST_LABEL = 80
STYLES = ("-", "--", ":")
Metric = str | tuple[str, str]  # a metric of a step, or (split, metric) of an evaluation
STEPS = [(metric_title(m.name), m.name, m.scale) for m in STEP_METRICS if m.title and not m.name.endswith("/*")]
PANELS: tuple[tuple[str, Metric, str], ...] = (  # title, metric, scale
    STEPS[0],
    ("Validation accuracy (% of problems)", ("validation", "accuracy"), "share"),
    *STEPS[1:],
    ("Time of a step (seconds)", "time/total", "number"),
    ("Forgetting: drift from the start (nats a token)", ("validation", "drift"), "number"),
)


def draw_comparison(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the comparison into a folder; return its path."""
    return [save_figure(comparison(groups), folder / COMPARISON)]


def comparison(groups: Sequence[Group]) -> Figure:
    """Draw each metric that any run has over the steps, in a colour for each group."""
    panels = [panel for panel in PANELS if _is_measured(groups, panel[1])] or list(PANELS[:1])
    rows = -(-len(panels) // 2)
    head = 0.8 + TEXT_LINE * len(groups)
    height = head + rows * ROW + FOOT
    figure = plt.figure(figsize=(WIDTH, height))
    box = {"left": 0.065, "right": 0.985, "top": 1 - head / height, "bottom": FOOT / height}
    grid = figure.add_gridspec(rows, 2, hspace=0.42, wspace=0.16, **box)
    first = None
    for number, (title, metric, scale) in enumerate(panels):
        axes = figure.add_subplot(grid[number // 2, number % 2], sharex=first)
        first = first or axes
        tidy(axes)
        lowest = number >= len(panels) - 2  # of its column
        axes.tick_params(labelsize=SMALL, labelbottom=lowest)
        said = _panel(axes, groups, metric, scale)
        axes.set_title(title + said, loc="left", fontsize=TEXT, weight="bold", pad=4)
        axes.set_xlim(0, max(1, *(group.steps for group in groups)) * 1.01)
        whole_steps(axes)
        if lowest:
            axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
    _explain(figure, groups, height)
    return figure


def _is_measured(groups: Sequence[Group], metric: Metric) -> bool:
    return any(np.isfinite(_series(record, metric)[1]).any() for group in groups for record in group.records)


def _panel(axes: Axes, groups: Sequence[Group], metric: Metric, scale: str) -> str:
    """Draw one metric of all groups; return a remark for the title."""
    series = [[_series(record, metric) for record in group.records] for group in groups]
    of_steps = isinstance(metric, str)
    shown = [_smoothed(v) if of_steps else v for group in series for _, v in group]
    values = np.concatenate([np.empty(0), *shown])
    known = values[np.isfinite(values)]
    said = ""
    if scale == "share":
        fitting_shares(axes, values)
    elif scale == "number":
        said = from_zero(axes, np.concatenate([values, *(v for group in series for _, v in group)]), values)
    else:
        axes.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))
    if not len(known):
        note(axes, "not measured")
        return said
    for number, one in enumerate(series):
        colour, style = _look(number)
        if of_steps:
            one = [(steps, _smoothed(values, axes)) for steps, values in one]
        else:
            one = _at_the_same_steps(one)
        few = not of_steps or max(len(values) for _, values in one) < SMOOTHED_FROM
        _curve(axes, one, colour, style, "o" if few else None)
        if metric == ("validation", "accuracy") and len(one) == 1:
            _intervals(axes, evaluations(groups[number].records[0], "validation"), colour)
    return said


def _smoothed(values: np.ndarray, axes: Axes | None = None) -> np.ndarray:
    if len(values) < SMOOTHED_FROM:
        return values
    window = window_for(len(values))
    return smooth_as_drawn(axes, values, window) if axes else smooth(values, window)


def _intervals(axes: Axes, points: Sequence[Mapping[str, Any]], colour: str) -> None:
    """Draw the 95% intervals of a run's evaluations."""
    steps, low, high = ([point[name] for point in points] for name in ("step", "ci_low", "ci_high"))
    axes.vlines(steps, low, high, color=colour, linewidth=THIN)


def _curve(
    axes: Axes, series: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, style: str, marker: str | None
) -> None:
    """Draw mean and range of some runs, thin where not all of them have a value."""
    series = [(steps, values) for steps, values in series if np.isfinite(values).any()]
    if not series:
        return
    spread = over_runs(series)
    if len(series) > 1:
        several = spread.runs > 1
        axes.fill_between(spread.steps, spread.low, spread.high, several, color=colour, alpha=0.22, linewidth=0)
    look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
    for runs in np.unique(
        spread.runs[spread.runs > 0]
    ):  # no line where a run begins or ends, as the mean jumps there
        mean = np.where(spread.runs == runs, spread.mean, np.nan)
        axes.plot(spread.steps, mean, linewidth=LINE if runs == len(series) else RAW, **look)


def _at_the_same_steps(
    series: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interpolate the evaluations of runs to all steps at which any was evaluated."""
    known = [(steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in series]
    known = [one for one in known if len(one[0])]
    every = np.unique(np.concatenate([np.empty(0), *(steps for steps, _ in known)]))
    return [(every, np.interp(every, steps, values, left=np.nan, right=np.nan)) for steps, values in known]


def _series(record: Mapping[str, Any], metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(metric, str):
        return column(record, "step"), drawable(column(record, metric))
    split, name = metric
    rows = {"steps": evaluations(record, split)}
    return column(rows, "step"), drawable(column(rows, name))


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]


def _explain(figure: Figure, groups: Sequence[Group], height: float) -> None:
    """Write the title, and the legend: what each colour is, how many runs, how far, and what the band shows."""
    runs = sum(len(group.records) for group in groups)
    figure.text(0.02, 1 - 0.10 / height, f"GRPO: {runs} runs compared", fontsize=LARGE, weight="bold", va="top")
    handles, labels = [], []
    for number, group in enumerate(groups):
        colour, style = _look(number)
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=2.2))
        labels.append(f" {plain(group.label, LONGEST_LABEL)}: {_what(group)}")
    place = {"loc": "upper left", "bbox_to_anchor": (0.0155, 1 - 0.3 / height), "borderaxespad": 0, "frameon": False}
    figure.legend(handles, labels, fontsize=SMALL, labelspacing=0.35, handlelength=1.6, borderpad=0.1, **place)
    said = ["Smoothed (a line fitted around each step). Bars: 95% intervals."]
    if any(len(group.records) > 1 for group in groups):
        said.append("Bands: smallest to largest of the runs; line: their mean, thin where not all have a value.")
    place = 1 - (0.34 + TEXT_LINE * len(groups)) / height
    figure.text(0.02, place, " ".join(said), fontsize=SMALL, color=GREY, va="top")


def _what(group: Group) -> str:
    """Return a text: how many runs, their seeds and steps, and what they reached on test problems."""
    seeds = ", ".join(dict.fromkeys(plain(str(seed), 12) for seed in group.seeds))
    steps = sorted({record["steps"][-1]["step"] if record["steps"] else 0 for record in group.records})
    far = f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
    many = len(group.records)
    text = f"{many} runs, mean and min to max, seeds {seeds}, {far}" if many > 1 else f"seed {seeds}, {far}"
    tests = [evaluations(record, "test") for record in group.records]
    after = sorted(100 * found[-1]["accuracy"] for found in tests if len(found) > 1)
    if after:
        reached = f"{after[0]:.1f}%" if len(after) == 1 else f"{after[0]:.1f} to {after[-1]:.1f}%"
        text += f", test {reached}" + (f" ({len(after)} of them)" if len(after) < many else "")
    return text
