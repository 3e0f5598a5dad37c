"""Shared by all figures: colours, lines, scales, and text from elsewhere made safe to draw."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib

from grpo.runtime.atomic_io import write_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo.config import TrainConfig
from grpo.plots.series import SMOOTHED_FROM, Record, column, evaluations, smooth, window_for
from grpo.runtime.console import printable

# Okabe and Ito's palette, told apart with any colour vision
BLUE, ORANGE, GREEN, PINK, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
BLACK, GREY = "#222222", "#666666"
LINE, RAW, THIN = 2.4, 1.2, 1.4  # points: a curve, its single steps, a level to compare with
LARGEST_DRAWN = 1e100  # matplotlib's own arithmetic overflows above
LONGEST_NAME = 60
SPIKE = 50  # times the median: then a scale is logarithmic


def plain(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a text that matplotlib shows literally: no mathematics, no control character, of limited length.

    >>> plain("a$b\\n")
    'a\\\\$b\\\\n'
    """
    text = printable(text)
    return (text if len(text) <= longest else text[: longest - 1] + "…").replace("$", r"\$")


@contextmanager
def any_glyph() -> Iterator[None]:
    """Suppress warnings about characters that the font lacks; they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and close it."""
    image = BytesIO()
    with any_glyph():
        figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    write_atomic(path, image.getvalue())
    return path


def tidy(axes: Axes) -> None:
    """Draw a light grid and no box."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def note(axes: Axes, text: str) -> None:
    """Write why nothing is drawn."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def whole_steps(axes: Axes) -> None:
    """Label an axis with whole numbers of steps."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def shares(axes: Axes, top: float = 1.05) -> None:
    """Scale an axis for shares, in %, up to `top`, by default 100%: a shorter axis makes a small gain look large."""
    axes.set_ylim(0, top)
    axes.set_yticks(np.linspace(0, top / 1.05, 5 if top > 1 else 3))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if top < 0.1 else 0))


def fitting_shares(axes: Axes, values: np.ndarray) -> None:
    """Scale an axis for shares, to 1, 10 or 100%, whichever holds all of them."""
    most = np.nan_to_num(values).max(initial=0.0)
    shares(axes, next((top for top in (0.0105, 0.105) if 1.05 * most <= top), 1.05))


def drawable(values: np.ndarray) -> np.ndarray:
    """Replace values beyond any scale by NaN."""
    return np.where(np.abs(np.nan_to_num(values)) < LARGEST_DRAWN, values, np.nan)


def smooth_as_drawn(axes: Axes, values: np.ndarray, window: int) -> np.ndarray:
    """Smooth values on the scale they are drawn on: on a logarithmic one a spike must not become a hill."""
    transform = axes.yaxis.get_transform()
    if axes.get_yscale() == "linear":
        return smooth(values, window)
    if axes.get_yscale() == "log":
        values = np.where(np.nan_to_num(values) > 0, values, np.nan)
    return transform.inverted().transform(smooth(transform.transform(values), window))


def line(axes: Axes, record: Record, name: str, colour: str, label: str | None = None, style: str = "-") -> bool:
    """Draw a metric over the steps, smoothed over faint raw values, or as markers; return whether there was any."""
    steps, values = column(record, "step"), drawable(column(record, name))
    if not np.isfinite(values).any():
        return False
    if len(values) < SMOOTHED_FROM:
        axes.plot(
            steps, values, color=colour, linewidth=LINE, linestyle=style, marker="o", markersize=4.5, label=label
        )
        return True
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=RAW)
    smoothed = smooth_as_drawn(axes, values, window_for(len(values)))
    axes.plot(steps, smoothed, color=colour, linewidth=LINE, linestyle=style, label=label)
    gap = np.pad(~np.isfinite(values), 1, constant_values=True)
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]  # between two gaps no line is drawn
    if alone.any():
        axes.plot(steps[alone], values[alone], color=colour, linestyle="none", marker="o", markersize=3)
    return True


def held_out(axes: Axes, record: Record, label: str, size: float = 5) -> None:
    """Draw validation accuracy over the steps with its intervals."""
    points = evaluations(record, "validation")
    if not points:
        return
    low = [max(0.0, entry["accuracy"] - entry["ci_low"]) for entry in points]  # rounding can give -1e-17
    high = [max(0.0, entry["ci_high"] - entry["accuracy"]) for entry in points]
    axes.errorbar(
        [entry["step"] for entry in points],
        [entry["accuracy"] for entry in points],
        yerr=[low, high],
        color=ORANGE,
        marker="o",
        markersize=size,
        capsize=3,
        linewidth=2.0,
        label=f"{label} (n = {points[0]['n']})",
        zorder=3,
    )


def from_zero(axes: Axes, values: np.ndarray, shown: np.ndarray | None = None) -> str:
    """Start an axis at 0, or at the least value below it; logarithmic if single values would flatten the others.

    Returns a remark on the scale for the title. `shown` are the values that will be drawn, if they are others.
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
    known = np.nan_to_num(drawable(np.asarray(values, dtype=float)))
    return known[known > 0]


def title_of(record: Record) -> str:
    """Return a title: what was trained, and how far it is."""
    config, steps = record["config"], record["steps"]
    done, planned = steps[-1]["step"] if steps else 0, config.get("num_iterations", "?")
    state = "" if record.get("finished") else ", not finished"
    model = plain(str(config.get("model", "?")))
    return f"GRPO on {model}, seed {plain(str(config.get('seed', '?')))}: step {done} of {plain(str(planned))}{state}"


def setting(record: Record, name: str) -> float:
    """Return a number among the settings, or its default if the run does not have it."""
    value = record["config"].get(name)
    sound = isinstance(value, (int, float)) and 0 <= value < LARGEST_DRAWN
    return float(value if sound else getattr(TrainConfig(), name))
