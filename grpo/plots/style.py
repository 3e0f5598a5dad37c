"""Define what all figures share: colours, sizes, lines, scales, and a function that escapes text to be drawn."""

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

from grpo.runtime.atomic_io import write_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo.config import TrainConfig
from grpo.plots.series import SMOOTHED_FROM, Record, column, smooth, window_for
from grpo.record.schema import evaluations
from grpo.runtime.console import printable

# The palette of Okabe and Ito can be told apart with any colour vision.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
AMBER = "#E69F00"
SKY = "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
BLACK = "#222222"
GREY = "#666666"
# Widths of lines, in points.
LINE = 2.4  # a curve
RAW = 1.2  # the values of single steps
THIN = 1.4  # a horizontal line, such as a limit
# Font sizes, in points.
SMALL = 7.5
TEXT = 8.5
LARGE = 11
WIDTH = 8.8  # width of a figure, in inches
LARGEST_DRAWN = 1e100  # The arithmetic of matplotlib overflows above this value.
LONGEST_NAME = 60  # A longer name is cut to this many characters.
SPIKE = 50  # A scale is logarithmic if the largest value is more than this many times the median.


def plain(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a text that matplotlib shows literally: no formulas, control characters escaped, cut to `longest`.

    >>> plain("a$b\\n")
    'a\\\\$b\\\\n'
    """
    text = printable(text)
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and close it."""
    image = BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box; the warning about it would not help a user.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomic(path, image.getvalue())
    return path


def tidy(axes: Axes) -> None:
    """Draw a light grid, and no frame at the top and at the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def note(axes: Axes, text: str) -> None:
    """Write into empty axes why nothing is drawn."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def whole_steps(axes: Axes) -> None:
    """Label the x axis with whole numbers of steps."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def shares(axes: Axes, top: float = 1.05) -> None:
    """Scale the y axis for shares, in %, up to `top`: by default to 105%, so that a small gain looks small."""
    axes.set_ylim(0, top)
    axes.set_yticks(np.linspace(0, top / 1.05, 5 if top > 1 else 3))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if top < 0.1 else 0))


def fitting_shares(axes: Axes, values: np.ndarray) -> None:
    """Scale the y axis for shares to 1, 10 or 100%: the smallest of them that holds all values."""
    most = np.nan_to_num(values).max(initial=0.0)
    shares(axes, next((top for top in (0.0105, 0.105) if 1.05 * most <= top), 1.05))


def rewards(axes: Axes, values: np.ndarray) -> None:
    """Scale the y axis for rewards: from 0 to 1, or wider if a reward is below 0 or above 1."""
    known = drawable(values)[np.isfinite(drawable(values))]
    axes.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))


def drawable(values: np.ndarray) -> np.ndarray:
    """Return the values, with NaN in place of values that are too large to draw."""
    return np.where(np.abs(np.nan_to_num(values)) < LARGEST_DRAWN, values, np.nan)


def smooth_as_drawn(axes: Axes, values: np.ndarray) -> np.ndarray:
    """Smooth values on the scale of the y axis, so that on a logarithmic axis a spike does not become a hill."""
    window = window_for(len(values))
    transform = axes.yaxis.get_transform()
    if axes.get_yscale() == "linear":
        return smooth(values, window)
    if axes.get_yscale() == "log":
        values = np.where(np.nan_to_num(values) > 0, values, np.nan)
    return transform.inverted().transform(smooth(transform.transform(values), window))


def line(axes: Axes, record: Record, name: str, colour: str, label: str | None = None, style: str = "-") -> bool:
    """Draw a metric over the steps; return whether the metric has any value.

    Many steps are drawn as a smoothed line over faint raw values, few steps as a line with markers.
    """
    steps, values = column(record, "step"), drawable(column(record, name))
    if not np.isfinite(values).any():
        return False
    if len(values) < SMOOTHED_FROM:
        axes.plot(steps, values, style, color=colour, linewidth=LINE, marker="o", markersize=4.5, label=label)
        return True
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=RAW)
    axes.plot(steps, smooth_as_drawn(axes, values), color=colour, linewidth=LINE, linestyle=style, label=label)
    gap = np.pad(~np.isfinite(values), 1, constant_values=True)
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]  # A value between two gaps has no line, so it gets a marker.
    if alone.any():
        axes.plot(steps[alone], values[alone], color=colour, linestyle="none", marker="o", markersize=3)
    return True


def held_out(axes: Axes, record: Record, label: str, size: float = 5) -> None:
    """Draw the validation accuracy over the steps with its 95% intervals."""
    points = evaluations(record, "validation")
    if not points:
        return
    look = {"color": ORANGE, "marker": "o", "markersize": size, "capsize": 3, "linewidth": 2.0, "zorder": 3}
    steps = [entry["step"] for entry in points]
    accuracies, errors = with_intervals(points)
    axes.errorbar(steps, accuracies, yerr=errors, label=f"{label} (n = {points[0]['n']})", **look)


def with_intervals(entries: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies, (entries,), and the distances of their 95% intervals below and above, (2, entries)."""
    rows = {"steps": entries}
    accuracies = column(rows, "accuracy")
    errors = np.stack([accuracies - column(rows, "ci_low"), column(rows, "ci_high") - accuracies])
    return accuracies, np.maximum(0.0, errors)  # rounding can give -1e-17


def from_zero(axes: Axes, values: np.ndarray, shown: np.ndarray | None = None) -> str:
    """Scale the y axis from 0, or from the smallest value if it is negative; return a remark for the title.

    The scale is logarithmic if a few large values would flatten all others. `shown` are the values that will be
    drawn, if these differ from `values`.
    """
    positive = _positive(values)
    drawn = values if shown is None else shown
    top = _positive(drawn).max(initial=0.0) or 1.0
    bottom = 1.08 * drawn[np.isfinite(drawn)].min(initial=0.0)
    if not len(positive) or positive.max() <= SPIKE * np.median(positive):
        axes.set_ylim(bottom, 1.08 * top)
        return ""
    threshold = 10.0 ** np.floor(np.log10(np.median(positive)))
    axes.set_yscale("symlog", linthresh=threshold)
    axes.set_ylim(bottom, 3 * max(top, threshold))
    decades = np.log10(max(top, threshold) / threshold)
    exponents = range(0, int(decades) + 2, max(1, int(decades) // 4))
    axes.set_yticks([0, *(threshold * 10.0**k for k in exponents)])
    axes.minorticks_off()
    return f", log above {threshold:g}"


def _positive(values: np.ndarray) -> np.ndarray:
    """Return the values above 0 that can be drawn."""
    known = np.nan_to_num(drawable(np.asarray(values, dtype=float)))
    return known[known > 0]


def title_of(record: Record) -> str:
    """Return the title of a figure: the model, the seed, and how many of the steps are done."""
    config, steps = record["config"], record["steps"]
    done = steps[-1]["step"] if steps else 0
    planned = config.get("num_iterations", "?")
    state = "" if record.get("finished") else ", not finished"
    model = plain(str(config.get("model", "?")))
    return f"GRPO on {model}, seed {plain(str(config.get('seed', '?')))}: step {done} of {plain(str(planned))}{state}"


def setting(record: Record, name: str) -> float:
    """Return the value of a numeric setting in a run, or its default if the record has no valid number."""
    value = record["config"].get(name)
    sound = isinstance(value, (int, float)) and 0 <= value < LARGEST_DRAWN
    return float(value if sound else getattr(TrainConfig(), name))
