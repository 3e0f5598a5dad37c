"""Draw the panels of the overview. Each function draws one panel and returns a remark for the panel's title.

A function returns None if there are no values to draw, and ZERO if a share is always 0. The overview leaves out
such panels. A metric of `STEP_METRICS` that has a title, but is not in `DRAWN`, gets a panel automatically.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from grpo.plots import style
from grpo.plots.series import SMOOTHED_FROM, Record, column, phases, reward_parts, smooth, window_for
from grpo.plots.style import AMBER, BLACK, BLUE, COLOURS, GREEN, GREY, LINE, ORANGE, PINK, SKY, THIN
from grpo.record.schema import evaluations, few_categories
from grpo.record.step_metrics import STEP_METRICS, metric_title

MOST_PARTS = 11  # At most this many parts of the reward are drawn.
STYLES = ("-", "--")  # The second style is for parts of a reward whose colour is already taken.
LEAST_LAYER = 0.005  # A layer that never exceeds this share of the highest stack is left out.
ZERO = "always 0"
Panel = Callable[[Axes, Record], str | None]


def _reward(axes: Axes, record: Record) -> str | None:
    names = reward_parts(record)
    for i, name in enumerate(names[:MOST_PARTS]):
        style.line(axes, record, f"reward/{name}", COLOURS[i % len(COLOURS)], short(name), STYLES[i // len(COLOURS)])
    drawn = style.line(axes, record, "reward_mean", BLACK, "all")
    values = np.concatenate([column(record, name) for name in ("reward_mean", *(f"reward/{n}" for n in names))])
    style.rewards(axes, values)
    return "" if drawn else None


def _accuracy(axes: Axes, record: Record) -> str | None:
    drawn = style.line(axes, record, "accuracy", BLUE, "sampled")
    style.held_out(axes, record, "validation, 95% interval", 4)
    if tests := evaluations(record, "test"):
        steps = [e["step"] for e in tests]
        accuracies = [e["accuracy"] for e in tests]
        axes.plot(steps, accuracies, color=GREEN, marker="D", markersize=6, linestyle="none", label="test", zorder=4)
    style.shares(axes)
    return "" if drawn or record["evals"] else None


def _number(name: str, colour: str, axes: Axes, record: Record) -> str | None:
    """Draw a metric on a y axis that starts at 0, or below if it is negative."""
    scale = style.from_zero(axes, column(record, name))
    return scale if style.line(axes, record, name, colour) else None


def _share(name: str, colour: str, axes: Axes, record: Record) -> str | None:
    """Draw a metric from 0 to 1 in %. The y axis ends at the first of 1, 10 and 100% that holds all values."""
    drawn = style.line(axes, record, name, colour)
    style.fitting_shares(axes, column(record, name))
    if not drawn:
        return None
    return "" if np.nan_to_num(column(record, name)).any() else ZERO


def _ratio(axes: Axes, record: Record) -> str | None:
    values = np.concatenate([style.drawable(column(record, name)) for name in ("ratio_max", "ratio_min")])
    known = values[np.isfinite(values) & (values > 0)]
    far = len(known) > 0 and known.max() > 10
    low = style.setting(record, "epsilon")
    high = style.setting(record, "epsilon_high") or low
    if far:  # Limits are set before drawing; else matplotlib 3.11 warns about an axis without height.
        axes.set_yscale("log")
        axes.set_ylim(min([max(0.1, 1 - 1.3 * low), *(known / 1.3)]), 1.3 * known.max())
    drawn = style.line(axes, record, "ratio_max", BLUE, "largest")
    drawn |= style.line(axes, record, "ratio_min", SKY, "smallest")
    for edge, label in ((1 - low, "clipping begins"), (1 + high, None)):
        axes.axhline(edge, color=GREY, linestyle=":", linewidth=THIN, label=label)
    if far:
        return ", log" if drawn else None
    axes.set_ylim(min([1 - 1.3 * low, *known]), max([1 + 1.3 * high, *(1.05 * known)]))
    return "" if drawn else None


def _length(axes: Axes, record: Record) -> str | None:
    drawn = style.line(axes, record, "completion_length", BLUE, "mean")
    limit = style.setting(record, "max_new_tokens")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=THIN, label="the limit")
    axes.set_ylim(0, 1.08 * limit)
    return "" if drawn else None


def _gradient(axes: Axes, record: Record) -> str | None:
    limit = style.setting(record, "clip_grad_norm")
    scale = style.from_zero(axes, np.append(column(record, "grad_norm"), limit))
    drawn = style.line(axes, record, "grad_norm", BLUE, "mean of the updates")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=THIN, label="clipped above")
    return scale if drawn else None


def _tied(axes: Axes, record: Record) -> str | None:
    right = column(record, "tied_all_right_fraction")
    wrong = column(record, "tied_all_wrong_fraction")
    tied = column(record, "tied_groups_fraction")
    other = np.maximum(0, tied - np.nan_to_num(right) - np.nan_to_num(wrong))
    layers = [("all right", right, GREEN), ("all wrong", wrong, ORANGE), ("other", other, GREY)]
    style.shares(axes)
    return "" if _stack(axes, record, layers) else None


def _loss(axes: Axes, record: Record) -> str | None:
    drawn = style.line(axes, record, "loss", BLUE)
    axes.axhline(0, color=GREY, linewidth=THIN)
    values = style.drawable(column(record, "loss"))
    most = np.abs(values[np.isfinite(values)]).max(initial=1e-3)
    axes.set_ylim(-1.1 * most, 1.1 * most)
    axes.yaxis.set_major_formatter("{x:g}")
    return "" if drawn else None


def _time(axes: Axes, record: Record) -> str | None:
    colours = {"sample": BLUE, "reward": PINK, "reference": AMBER, "update": GREEN}
    layers = [(name, column(record, f"time/{name}"), colours.get(name, SKY)) for name in phases(record)]
    # Saving follows a step, so its time is not part of the total.
    rest = column(record, "time/total") - sum(np.nan_to_num(values) for name, values, _ in layers if name != "save")
    layers.append(("other", np.maximum(0, rest), GREY))
    drawn = _stack(axes, record, [(short(name), values, colour) for name, values, colour in layers])
    axes.set_ylim(bottom=0)
    return "" if drawn else None


def _drift(axes: Axes, record: Record) -> str | None:
    points = [e for e in record["evals"] if e.get("drift") is not None]
    points = evaluations({"evals": points}, "validation") or points
    values = [e["drift"] for e in points]
    axes.plot([e["step"] for e in points], values, color=PINK, marker="o", markersize=4.5, linewidth=LINE)
    return style.from_zero(axes, np.array(values, dtype=float)) if points else None


def skills(axes: Axes, record: Record) -> str | None:
    """Draw the accuracy of skills that are not trained on, before and after training; the y axis lists the skills."""
    tests = [e for e in evaluations(record, "test") if isinstance(e.get("skills"), dict) and e["skills"]]
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if not tests:
        return None
    names = list(tests[0]["skills"])
    moments = [(tests[0], GREY, "before", 0.16), (tests[-1], BLUE, "after", -0.16)]
    for entry, colour, label, away in moments[: len(tests)]:
        measured = [entry["skills"].get(name) for name in reversed(names)]
        accuracies, errors = style.with_intervals([skill if isinstance(skill, dict) else {} for skill in measured])
        look = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "none", "elinewidth": LINE}
        axes.errorbar(accuracies, np.arange(len(names)) + away, xerr=errors, label=label, clip_on=False, **look)
    axes.set_yticks(range(len(names)), [style.plain(name, 12) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    return ""


def short(name: str) -> str:
    """Return a short name for a legend. A leading underscore gets a space before it, or matplotlib omits the name."""
    return style.plain(name if not name.startswith("_") else " " + name, 16)


def _stack(axes: Axes, record: Record, layers: Sequence[tuple[str, np.ndarray, str]]) -> bool:
    """Stack layers (name, values, colour) as areas, or as bars if steps are few; return whether any is drawn."""
    steps = column(record, "step")
    layers = [(name, style.drawable(values), colour) for name, values, colour in layers]
    top = sum(np.nan_to_num(values) for _, values, _ in layers).max(initial=0.0)
    layers = [layer for layer in layers if np.nan_to_num(layer[1]).max(initial=0.0) > LEAST_LAYER * top]
    if not layers:
        return False
    if len(steps) < SMOOTHED_FROM:
        base = np.zeros(len(steps))
        for name, values, colour in layers:
            heights = np.nan_to_num(values)
            axes.bar(steps, heights, 0.6, base, color=colour, label=name, linewidth=0)
            base += heights
        return True
    window = window_for(len(steps))
    heights = [np.nan_to_num(smooth(values, window)) for _, values, _ in layers]
    names, _, colours = zip(*layers, strict=True)
    axes.stackplot(steps, heights, labels=names, colors=colours, alpha=0.85, linewidth=0)
    return True


def _of_table() -> list[tuple[str, Panel]]:
    """Return a panel for each metric of `STEP_METRICS` that has a title and is not in `DRAWN`."""
    new = [metric for metric in STEP_METRICS if metric.title and metric.name not in DRAWN]
    return [(metric_title(m.name), partial(_share if m.scale == "share" else _number, m.name, BLUE)) for m in new]


def _by_category(axes: Axes, record: Record) -> str | None:
    points = evaluations(record, "validation")
    names = list(dict.fromkeys(name for entry in points for name in few_categories(entry)))
    for i, name in enumerate(names):
        entries = [entry for entry in points if name in few_categories(entry)]
        steps = [entry["step"] for entry in entries]
        values = [entry["categories"][name]["accuracy"] for entry in entries]
        axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], label=short(name), marker="o", markersize=4.5)
    style.shares(axes)
    return "" if names else None


# The metrics that the functions above draw.
DRAWN = {"reward_mean", "accuracy", "kl", "entropy", "clip_fraction", "completion_length", "truncated_fraction"}
DRAWN |= {"grad_norm", "tied_groups_fraction"}
PANELS: tuple[tuple[str, Panel], ...] = (
    ("Reward by part (mean of the step)", _reward),
    ("Exact answers (% of problems)", _accuracy),
    (metric_title("kl"), partial(_number, "kl", ORANGE)),
    (metric_title("entropy"), partial(_number, "entropy", BLUE)),
    (metric_title("clip_fraction"), partial(_share, "clip_fraction", BLUE)),
    ("Ratio to the sampling policy", _ratio),
    (metric_title("completion_length"), _length),
    (metric_title("truncated_fraction"), partial(_share, "truncated_fraction", ORANGE)),
    (metric_title("grad_norm"), _gradient),
    (metric_title("tied_groups_fraction"), _tied),
    ("Accuracy by category (% of validation problems)", _by_category),
    *_of_table(),
    ("Loss (near 0 is normal)", _loss),
    ("Time of a step (seconds)", _time),
    ("Forgetting: drift from the start (nats a token)", _drift),
    ("Forgetting: neighbouring skills (% right)", skills),
)
