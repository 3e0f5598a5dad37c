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

from grpo.plots.panels import PANELS, ZERO, skills
from grpo.plots.series import SMOOTHED_FROM, Record, column, evaluations, findings, window_for
from grpo.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    THIN,
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

WIDTH, FOOT, TEXT_LINE = 8.8, 0.05, 0.165  # inches; a README shows the width as 880 pixels
TOP, PANEL, GAP, NUMBERS, ABOVE, LEGEND_LINE = (
    0.5,
    1.15,
    0.2,
    0.25,
    0.24,
    0.16,
)  # inches: heights of the overview's parts
LEFT, PANEL_WIDTH, BETWEEN = 0.85, 3.5, 0.85  # inches: their widths
SMALL, TEXT, LARGE = 7.5, 8.5, 11  # points
LETTERS = 145  # of a line of findings
MOST_FINDINGS = 12
NEAR = 0.035  # of the steps: findings closer than this share a label


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw the figures of a run into a folder; return their paths."""
    drawn = [(CURVE, training_curve), (OVERVIEW, overview)]
    drawn += [(KL, kl_divergence)] if record["config"].get("beta") != 0 else []  # else there is no reference
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
        bottom.axhline(start, color=GREY, linestyle="--", linewidth=THIN, label=f"start: {100 * start:.1f}%")
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
        note(axes, "not measured" if record["steps"] else NO_STEPS)
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
    figure = plt.figure(figsize=(WIDTH, 1))
    panels, flat = _panels(figure, record)
    if flat:
        words = [*textwrap.wrap(f"Not drawn, as there is nothing but 0: {', '.join(flat)}.", LETTERS), *words]
    last = max([1, *(s["step"] for s in record["steps"]), *(e["step"] for e in record["evals"])])
    over_steps = [(number, axes) for number, (axes, _, steps) in enumerate(panels) if steps]
    lowest = {number % 2: axes for number, axes in over_steps}.values()  # of each column
    for _, axes in over_steps:
        aside = 0.35 if last < SMOOTHED_FROM else 0.01 * last  # half a bar
        axes.set_xlim(-aside, last + aside)
        whole_steps(axes)
        axes.tick_params(labelbottom=axes in lowest)
        if axes in lowest:
            axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
        _mark(axes, found, last)
    below = FOOT + TEXT_LINE * (len(words) + bool(words))
    height = _arrange(figure, panels, below)
    _write(figure, record, words, height)
    return figure


def _panels(figure: Figure, record: Record) -> tuple[list[tuple[Axes, str, bool]], list[str]]:
    """Draw the panels that have something to show: axes, title, and whether they are over steps; and the others.

    The others are the titles of those whose metric is 0 throughout.
    """
    panels, flat = [], []
    for number, (title, draw) in enumerate(PANELS):
        axes = figure.add_axes((0, 0, 1, 1), label=str(number))
        tidy(axes)
        axes.tick_params(labelsize=SMALL)
        remark = draw(axes, record)
        if remark in (None, ZERO):
            flat += [title.partition(" (")[0].lower()] if remark else []
            axes.remove()
        else:
            panels.append((axes, title + remark, draw is not skills))
    if not panels:
        axes = figure.add_axes((0, 0, 1, 1))
        tidy(axes)
        axes.tick_params(labelsize=SMALL)
        note(axes, NO_STEPS)
        panels.append((axes, PANELS[0][0], True))
    return panels, flat


def _arrange(figure: Figure, panels: Sequence[tuple[Axes, str, bool]], below: float) -> float:
    """Place panels in two columns, each row with the room that its legends take; return the figure's height."""
    rows = []  # lines of legend above, and inches below
    for i in range(0, len(panels), 2):
        row = [axes for axes, *_ in panels[i : i + 2]]
        numbered = any(axes.xaxis.get_tick_params()["labelbottom"] for axes in row)
        rows.append((max(map(_rows_of_legend, row)), GAP + NUMBERS * numbered))
    height = TOP + sum(ABOVE + LEGEND_LINE * lines + PANEL + under for lines, under in rows) + below
    figure.set_size_inches(WIDTH, height)
    place = TOP
    for number, (axes, title, _) in enumerate(panels):
        lines, under = rows[number // 2]
        top = place + ABOVE + LEGEND_LINE * lines
        left = LEFT + number % 2 * (PANEL_WIDTH + BETWEEN)
        axes.set_position((left / WIDTH, 1 - (top + PANEL) / height, PANEL_WIDTH / WIDTH, PANEL / height))
        _head(axes, title, lines)
        if number % 2:
            place = top + PANEL + under
    return height


def _rows_of_legend(axes: Axes) -> int:
    labels = axes.get_legend_handles_labels()[1]
    return -(-len(labels) // _columns(labels))


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


def _head(axes: Axes, title: str, lines: int) -> None:
    """Write the panel's title, and below it its legend, where it covers nothing, in the room of so many lines."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        style = {"frameon": False, "borderaxespad": 0.1, "handlelength": 1.3, "columnspacing": 1, "labelspacing": 0.2}
        style |= {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncol": _columns(labels)}
        axes.legend(handles, labels, fontsize=SMALL, **style)
    axes.set_title(title, loc="left", fontsize=TEXT, weight="bold", pad=4 + 72 * LEGEND_LINE * lines)


def _columns(labels: Sequence[str]) -> int:
    """Return how many entries of a legend fit side by side, from the width of letters and signs in points."""
    if sum(4.4 * len(label) + 26 for label in labels) < 300:
        return max(1, len(labels))
    return max(1, int(300 / (4.4 * max(map(len, labels)) + 26)))
