"""The figures of a run, drawn from its metrics. Raw values are faint, the smoothed line is strong."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.curves import SMOOTHED_FROM, Record, column, evaluations
from grpo.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    drawable,
    from_zero,
    held_out,
    line,
    note,
    save_figure,
    shares,
    tidy,
    title_of,
    whole_steps,
)
from grpo.overview import overview

CURVE, KL, OVERVIEW = "grpo_training_curve.png", "grpo_kl_divergence.png", "grpo_overview.png"
NO_STEPS = "no steps yet"


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw the figures of a run into a folder; returns what was written."""
    drawn = ((CURVE, training_curve), (KL, kl_divergence), (OVERVIEW, overview))
    return [save_figure(draw(record), folder / name) for name, draw in drawn]


def training_curve(record: Record) -> Figure:
    """Reward over steps above, accuracy below: sampled, and held-out with its interval and the start."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.4), layout="constrained")
    figure.suptitle(title_of(record), fontsize=12)
    for axes in (top, bottom):
        tidy(axes)
    if not line(top, record, "reward_mean", BLUE, _smoothed(record, "reward, mean of the step")):
        note(top, NO_STEPS)
    rewards = drawable(column(record, "reward_mean"))
    known = rewards[np.isfinite(rewards)]
    top.set_ylabel("reward (of one completion)")
    top.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))  # weights of the user's may go beyond
    if not line(bottom, record, "accuracy", BLUE, _smoothed(record, "sampled (training problems)")):
        note(bottom, NO_STEPS)
    held_out(bottom, record, "validation, greedy, 95% interval")
    if points := evaluations(record, "validation"):
        start = points[0]["accuracy"]
        bottom.axhline(start, color=GREY, linestyle="--", linewidth=1, label=f"start: {100 * start:.1f}%")
    if len(tests := evaluations(record, "test")) > 1:
        last = tests[-1]
        text = f"test, saved model: {100 * last['accuracy']:.1f}% (n = {last['n']})"
        place = (last["step"], last["accuracy"])
        bottom.plot(*place, color=GREEN, marker="D", markersize=7, linestyle="none", label=text, zorder=4)
    bottom.set_ylabel("exact answers (% of problems)")
    shares(bottom)
    bottom.set_xlabel("step")
    whole_steps(bottom)
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:
            _legend(axes)
    return figure


def kl_divergence(record: Record) -> Figure:
    """KL of the policy to the reference over steps."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    figure.suptitle(f"KL to the reference, beta {record['config'].get('beta', '?')}", fontsize=12, parse_math=False)
    tidy(axes)
    axes.set_ylabel(f"KL (nats a token{from_zero(axes, column(record, 'kl'))})")
    drawn = line(axes, record, "kl", ORANGE, _smoothed(record, "k3, mean over the step's completion tokens"))
    if not drawn:
        note(axes, "not measured: beta is 0" if record["steps"] else NO_STEPS)
    axes.set_xlabel("step")
    whole_steps(axes)
    if drawn:
        _legend(axes)
    return figure


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=2, fontsize=9, frameon=False, borderaxespad=0.2)


def _smoothed(record: Record, label: str) -> str:
    return f"{label}, smoothed" if len(record["steps"]) >= SMOOTHED_FROM else label
