"""Draw several runs in one picture: a curve for each group of runs, with a band if the group has several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from grpo.plots import style
from grpo.plots.series import SMOOTHED_FROM, Group, column, over_runs, smooth, window_for
from grpo.plots.style import COLOURS, GREY, LARGE, LINE, RAW, SMALL, TEXT, THIN, WIDTH
from grpo.record.schema import evaluations
from grpo.record.step_metrics import STEP_METRICS, metric_title

COMPARISON = "grpo_comparison.png"
# Heights of parts of the figure, in inches.
ROW = 1.55
FOOT = 0.45
TEXT_LINE = 0.19
LONGEST_LABEL = 80  # characters
STYLES = ("-", "--", ":")
Metric = str | tuple[str, str]  # a metric of a step, or (split, metric) of an evaluation
STEPS = [(metric_title(m.name), m.name, m.scale) for m in STEP_METRICS if m.title and not m.name.endswith("/*")]
PANELS: tuple[tuple[str, Metric, str], ...] = (  # title, metric and scale of each panel
    STEPS[0],
    ("Validation accuracy (% of problems)", ("validation", "accuracy"), "share"),
    *STEPS[1:],
    ("Time of a step (seconds)", "time/total", "number"),
    ("Forgetting: drift from the start (nats a token)", ("validation", "drift"), "number"),
)


def draw_comparison(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw the comparison into a folder; return a list with the picture's path as its only item."""
    return [style.save_figure(comparison(groups), folder / COMPARISON)]


def comparison(groups: Sequence[Group]) -> Figure:
    """Draw each metric that at least one run has, over the steps, with a colour for each group."""
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
        style.tidy(axes)
        lowest = number >= len(panels) - 2  # whether this is the lowest panel of its column
        axes.tick_params(labelsize=SMALL, labelbottom=lowest)
        remark = _panel(axes, groups, metric, scale)
        axes.set_title(title + remark, loc="left", fontsize=TEXT, weight="bold", pad=4)
        axes.set_xlim(0, max(1, *(group.steps for group in groups)) * 1.01)
        style.whole_steps(axes)
        if lowest:
            axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
    _explain(figure, groups, height)
    return figure


def _is_measured(groups: Sequence[Group], metric: Metric) -> bool:
    return any(np.isfinite(_series(record, metric)[1]).any() for group in groups for record in group.records)


def _panel(axes: Axes, groups: Sequence[Group], metric: Metric, scale: str) -> str:
    """Draw one metric of all groups; return a remark about the scale, for the title."""
    series = [[_series(record, metric) for record in group.records] for group in groups]
    is_step_metric = isinstance(metric, str)
    raw = [values for group in series for _, values in group]
    drawn = np.concatenate([np.empty(0), *(map(_smoothed, raw) if is_step_metric else raw)])
    remark = ""
    if scale == "share":
        style.fitting_shares(axes, drawn)
    elif scale == "number":
        remark = style.from_zero(axes, np.concatenate([drawn, *raw]), drawn)
    else:
        style.rewards(axes, drawn)
    if not np.isfinite(drawn).any():
        style.note(axes, "not measured")
        return remark
    for number, runs in enumerate(series):
        colour, dashes = _look(number)
        if is_step_metric:
            runs = [(steps, _smoothed(values, axes)) for steps, values in runs]
        else:
            runs = _at_the_same_steps(runs)
        few = not is_step_metric or max(len(values) for _, values in runs) < SMOOTHED_FROM
        _curve(axes, runs, colour, dashes, "o" if few else None)
        if metric == ("validation", "accuracy") and len(runs) == 1:
            rows = {"steps": evaluations(groups[number].records[0], "validation")}
            ends = (column(rows, "ci_low"), column(rows, "ci_high"))
            axes.vlines(column(rows, "step"), *ends, color=colour, linewidth=THIN)
    return remark


def _smoothed(values: np.ndarray, axes: Axes | None = None) -> np.ndarray:
    if len(values) < SMOOTHED_FROM:
        return values
    return style.smooth_as_drawn(axes, values) if axes else smooth(values, window_for(len(values)))


def _curve(
    axes: Axes, series: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, dashes: str, marker: str | None
) -> None:
    """Draw the mean and the range of several runs; the line is thin at steps where some runs have no value."""
    series = [(steps, values) for steps, values in series if np.isfinite(values).any()]
    if not series:
        return
    spread = over_runs(series)
    if len(series) > 1:
        several = spread.runs > 1
        axes.fill_between(spread.steps, spread.low, spread.high, several, color=colour, alpha=0.22, linewidth=0)
    look = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4}
    # Where a run begins or ends, the mean jumps. So steps with equally many runs are drawn as a separate line.
    for runs in np.unique(spread.runs[spread.runs > 0]):
        mean = np.where(spread.runs == runs, spread.mean, np.nan)
        axes.plot(spread.steps, mean, linewidth=LINE if runs == len(series) else RAW, **look)


def _at_the_same_steps(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interpolate each run's evaluations to all steps where any run was evaluated; NaN outside its own range."""
    known = [(steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in series]
    known = [(steps, values) for steps, values in known if len(steps)]
    every = np.unique(np.concatenate([np.empty(0), *(steps for steps, _ in known)]))
    return [(every, np.interp(every, steps, values, left=np.nan, right=np.nan)) for steps, values in known]


def _series(record: Mapping[str, Any], metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Return a run's steps and the values of a metric at these steps, (steps,) each."""
    if not isinstance(metric, str):
        split, metric = metric
        record = {"steps": evaluations(record, split)}
    return column(record, "step"), style.drawable(column(record, metric))


def _look(number: int) -> tuple[str, str]:
    """Return the colour and the line style of a group."""
    return COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]


def _explain(figure: Figure, groups: Sequence[Group], height: float) -> None:
    """Write the title, a legend that describes the runs of each colour, and the meaning of bars and bands."""
    runs = sum(len(group.records) for group in groups)
    figure.text(0.02, 1 - 0.10 / height, f"GRPO: {runs} runs compared", fontsize=LARGE, weight="bold", va="top")
    handles, labels = [], []
    for number, group in enumerate(groups):
        colour, dashes = _look(number)
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=2.2))
        labels.append(f" {style.plain(group.label, LONGEST_LABEL)}: {_description(group)}")
    place = {"loc": "upper left", "bbox_to_anchor": (0.0155, 1 - 0.3 / height), "borderaxespad": 0, "frameon": False}
    figure.legend(handles, labels, fontsize=SMALL, labelspacing=0.35, handlelength=1.6, borderpad=0.1, **place)
    notes = ["Curves are smoothed by local linear fits. Bars: 95% intervals."]
    if any(len(group.records) > 1 for group in groups):
        notes.append("Bands: smallest to largest value; lines: mean, thin where some runs have no value.")
    place = 1 - (0.34 + TEXT_LINE * len(groups)) / height
    figure.text(0.02, place, " ".join(notes), fontsize=SMALL, color=GREY, va="top")


def _description(group: Group) -> str:
    """Return a text with the number of runs, their seeds and steps, and their test accuracy after training."""
    seeds = ", ".join(dict.fromkeys(style.plain(str(seed), 12) for seed in group.seeds))
    steps = sorted({record["steps"][-1]["step"] if record["steps"] else 0 for record in group.records})
    length = f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"
    many = len(group.records)
    text = f"{many} runs, mean and min to max, seeds {seeds}, {length}" if many > 1 else f"seed {seeds}, {length}"
    tests = [evaluations(record, "test") for record in group.records]
    after = sorted(100 * entries[-1]["accuracy"] for entries in tests if len(entries) > 1)
    if after:
        reached = f"{after[0]:.1f}%" if len(after) == 1 else f"{after[0]:.1f} to {after[-1]:.1f}%"
        text += f", test {reached}" + (f" ({len(after)} of the runs)" if len(after) < many else "")
    return text
