"""The figures of a run: training curve, KL, and an overview of every metric with the findings.

Raw values are faint, the smoothed line is strong.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.plots.panels import MOST_PARTS, panels_of, short, skills
from grpo.plots.series import SMOOTHED_FROM, Record, column, evaluations, findings, reward_parts, window_for
from grpo.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    drawable,
    from_zero,
    held_out,
    line,
    note,
    plain,
    save_figure,
    shares,
    tidy,
    title_of,
    whole_steps,
)

CURVE, KL, OVERVIEW = "grpo_training_curve.png", "grpo_kl_divergence.png", "grpo_overview.png"
SFT = "grpo_sft_curve.png"  # of runs that fine-tune first
NO_STEPS = "no steps yet"

WIDTH, ROW, HEAD, FOOT, TEXT_LINE = 8.8, 1.6, 0.88, 0.45, 0.165  # inches; a README shows the width as 880 pixels
SMALL, TEXT, LARGE = 7.5, 8.5, 11  # points
LETTERS = 145  # of a line of findings
MOST_FINDINGS = 12
NEAR = 0.035  # of the steps: findings closer than this share a label


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw the figures of a run into a folder; return their paths."""
    drawn = [(CURVE, training_curve), (KL, kl_divergence), (OVERVIEW, overview)]
    drawn += [(SFT, sft_curve)] if record.get("sft") else []
    return [save_figure(draw(record), folder / name) for name, draw in drawn]


def training_curve(record: Record) -> Figure:
    """Draw reward over steps, and below it accuracy: sampled, and held-out with interval and start."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.4), layout="constrained")
    figure.suptitle(title_of(record), fontsize=12)
    for axes in (top, bottom):
        tidy(axes)
    if not line(top, record, "reward_mean", BLUE, _smoothed(record, "reward, mean of the step")):
        note(top, NO_STEPS)
    rewards = drawable(column(record, "reward_mean"))
    known = rewards[np.isfinite(rewards)]
    top.set_ylabel("reward (of one completion)")
    top.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))  # the user's weights may go beyond 1
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
    """Draw the KL of the policy to the reference over steps."""
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


def sft_curve(record: Record) -> Figure:
    """Draw the loss of the supervised steps before GRPO, with the test accuracy before and after them."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    tests = [e for e in (record.get("before_sft"), *evaluations(record, "test")[:1]) if e]
    reached = " → ".join(f"{100 * e['accuracy']:.1f}%" for e in tests)
    figure.suptitle("Supervised steps before GRPO" + (f": test {reached}" if reached else ""), fontsize=12)
    tidy(axes)
    supervised = {**record, "steps": record["sft"]}
    label = _smoothed(supervised, "mean over the step's completion tokens")
    axes.set_ylabel(f"loss (nats a token{from_zero(axes, column(supervised, 'loss'))})")
    if line(axes, supervised, "loss", BLUE, label):
        _legend(axes)
    else:
        note(axes, NO_STEPS)
    axes.set_xlabel("supervised step")
    whole_steps(axes)
    return figure


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=2, fontsize=9, frameon=False, borderaxespad=0.2)


def _smoothed(record: Record, label: str) -> str:
    return f"{label}, smoothed" if len(record["steps"]) >= SMOOTHED_FROM else label


def overview(record: Record) -> Figure:
    """Draw every metric of a run over its steps; findings are numbered lines, and text below."""
    found, words = findings(record)[:MOST_FINDINGS], _in_words(record)
    labels = [*(short(name) for name in reward_parts(record)[:MOST_PARTS]), "all"]
    head = HEAD + 0.16 * ((len(labels) - 1) // _columns(labels))
    panels = panels_of(record)
    rows = -(-len(panels) // 2)
    height = head + rows * ROW + FOOT + TEXT_LINE * (len(words) + bool(words))
    figure = plt.figure(figsize=(WIDTH, height))
    below = (FOOT + TEXT_LINE * (len(words) + bool(words))) / height
    grid = figure.add_gridspec(
        rows, 2, left=0.065, right=0.985, top=1 - head / height, bottom=below, hspace=0.62, wspace=0.16
    )
    axes: list[Axes] = []
    last = max([1, *(s["step"] for s in record["steps"]), *(e["step"] for e in record["evals"])])
    for number, (title, draw) in enumerate(panels):
        over_steps = draw is not skills
        place = number if number < len(panels) - 2 else number + len(panels) % 2  # the last two share a row
        one = figure.add_subplot(grid[place // 2, place % 2], sharex=axes[0] if axes and over_steps else None)
        axes.append(one)
        tidy(one)
        one.tick_params(labelsize=SMALL)
        _head(one, title + draw(one, record))
        if over_steps:
            aside = 0.35 if last < SMOOTHED_FROM else 0.01 * last  # half a bar
            one.set_xlim(-aside, last + aside)
            whole_steps(one)
            one.tick_params(labelbottom=number >= len(panels) - 3)
            _mark(one, found, last)
    axes[-2].set_xlabel("step", fontsize=TEXT, labelpad=1)
    _write(figure, record, words, height)
    return figure


def _write(figure: Figure, record: Record, words: Sequence[str], height: float) -> None:
    """Write the text above and below the panels."""
    figure.text(0.02, 1 - 0.10 / height, title_of(record), fontsize=LARGE, weight="bold", va="top")
    said = []
    if len(tests := evaluations(record, "test")) > 1:
        before, after = tests[0], tests[-1]
        said.append(f"Test {100 * before['accuracy']:.1f}% → {100 * after['accuracy']:.1f}% (n = {after['n']}).")
    if (steps := len(record["steps"])) >= SMOOTHED_FROM:
        said.append(f"Faint: every step; strong: a line fitted to {window_for(steps)} steps around each.")
    figure.text(0.02, 1 - 0.32 / height, " ".join(said), fontsize=SMALL, color=GREY, va="top")
    top = TEXT_LINE * (len(words) + 0.35)
    for number, text in enumerate(words):
        place = (top - number * TEXT_LINE) / height
        figure.text(0.02, place, text, fontsize=SMALL, color=BLACK, va="top")


def _in_words(record: Record) -> list[str]:
    """Return the findings as numbered lines of text."""
    found = findings(record)
    lines = []
    for number, one in enumerate(found[:MOST_FINDINGS], 1):
        step = f"step {one['step']}: " if isinstance(one.get("step"), int) else ""
        text = f"{number}  {step}{' '.join(one['text'].split())}"
        style = {"subsequent_indent": "     ", "max_lines": 3, "placeholder": " …", "break_on_hyphens": False}
        lines += textwrap.wrap(text, LETTERS, **style)
    if len(found) > MOST_FINDINGS:
        lines.append(f"{len(found) - MOST_FINDINGS} more in the metrics file")
    return [plain(text, 2 * LETTERS) for text in lines]


def _mark(axes: Axes, found: Sequence[Record], last: int) -> None:
    """Draw a thin line with a number at the step of each finding; those close together share a label."""
    places = [(number, one["step"]) for number, one in enumerate(found, 1) if isinstance(one.get("step"), int)]
    together: list[list[tuple[int, int]]] = []
    for place in places:
        if place[1] > last:
            continue
        axes.axvline(place[1], color=BLACK, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        if together and place[1] - together[-1][0][1] < NEAR * last:
            together[-1].append(place)
        else:
            together.append([place])
    for group in together:
        text = str(group[0][0]) if len(group) == 1 else f"{group[0][0]}–{group[-1][0]}"
        step = min(max(group[0][1], 0.012 * last), 0.985 * last)
        box = {"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": BLACK, "linewidth": 0.6}
        where = axes.get_xaxis_transform()
        axes.text(step, 0.93, text, transform=where, fontsize=6, ha="center", va="center", bbox=box, zorder=6)


def _head(axes: Axes, title: str) -> None:
    """Write the panel's title, and its legend between title and axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = _columns(labels)
    rows = -(-len(labels) // columns)
    if labels:
        style = {"frameon": False, "borderaxespad": 0.1, "handlelength": 1.3, "columnspacing": 1, "labelspacing": 0.2}
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=columns, fontsize=SMALL, **style
        )
    axes.set_title(title, loc="left", fontsize=TEXT, weight="bold", pad=4 + 11.5 * rows)


def _columns(labels: Sequence[str]) -> int:
    """Return how many entries of a legend fit side by side, from the width of letters and signs in points."""
    if sum(4.4 * len(label) + 26 for label in labels) < 300:
        return max(1, len(labels))
    return max(1, int(300 / (4.4 * max(map(len, labels)) + 26)))
