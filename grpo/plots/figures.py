"""Draw the figures of a run: training curve, KL, SFT loss, and an overview of every metric with the findings."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.plots import style
from grpo.plots.panels import PANELS, ZERO, skills
from grpo.plots.series import SMOOTHED_FROM, Record, column, findings, window_for
from grpo.plots.style import BLACK, BLUE, GREEN, GREY, LARGE, ORANGE, SMALL, TEXT, THIN, WIDTH
from grpo.record.schema import evaluations

CURVE = "grpo_training_curve.png"
KL = "grpo_kl_divergence.png"
OVERVIEW = "grpo_overview.png"
SFT = "grpo_sft_curve.png"  # only for runs with supervised steps
NO_STEPS = "no steps yet"

# Heights of parts of the overview, in inches.
TOP = 0.5
TITLE = 0.24
LEGEND_LINE = 0.16
PANEL = 1.15
NUMBERS = 0.25
GAP = 0.2
TEXT_LINE = 0.165
FOOT = 0.05
# Widths of parts of the overview, in inches.
LEFT = 0.85
PANEL_WIDTH = 3.5
BETWEEN = 0.85
TEXT_COLUMNS = 145  # Lines of text below the panels wrap at this many characters.
MOST_FINDINGS = 12
NEAR = 0.035  # Findings that are closer together than this share of all steps get a common label.


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw the figures of a run into a folder; return their paths."""
    drawn = [(CURVE, training_curve), (OVERVIEW, overview)]
    drawn += [(KL, kl_divergence)] if record["config"].get("beta") != 0 else []  # with beta 0 there is no reference
    drawn += [(SFT, sft_curve)] if record.get("sft") else []
    return [style.save_figure(draw(record), folder / name) for name, draw in drawn]


def training_curve(record: Record) -> Figure:
    """Draw the reward over the steps, and below it the sampled and the validation accuracy."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.4), layout="constrained")
    figure.suptitle(style.title_of(record), fontsize=12)
    for axes in (top, bottom):
        style.tidy(axes)
    if not style.line(top, record, "reward_mean", BLUE, _smoothed(record, "reward, mean of the step")):
        style.note(top, NO_STEPS)
    top.set_ylabel("reward (of one completion)")
    style.rewards(top, column(record, "reward_mean"))
    if not style.line(bottom, record, "accuracy", BLUE, _smoothed(record, "sampled (training problems)")):
        style.note(bottom, NO_STEPS)
    style.held_out(bottom, record, "validation, greedy, 95% interval")
    if points := evaluations(record, "validation"):
        start = points[0]["accuracy"]
        bottom.axhline(start, color=GREY, linestyle="--", linewidth=THIN, label=f"start: {100 * start:.1f}%")
    if len(tests := evaluations(record, "test")) > 1:
        last = tests[-1]
        text = f"test, saved model: {100 * last['accuracy']:.1f}% (n = {last['n']})"
        place = (last["step"], last["accuracy"])
        bottom.plot(*place, color=GREEN, marker="D", markersize=7, linestyle="none", label=text, zorder=4)
    bottom.set_ylabel("exact answers (% of problems)")
    style.shares(bottom)
    bottom.set_xlabel("step")
    style.whole_steps(bottom)
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:
            _legend(axes)
    return figure


def kl_divergence(record: Record) -> Figure:
    """Draw the KL of the policy to the reference over the steps."""
    title = f"KL to the reference, beta {record['config'].get('beta', '?')}"
    return _one_metric(record, "kl", ORANGE, title, "KL", "k3, mean over the step's completion tokens")


def sft_curve(record: Record) -> Figure:
    """Draw the loss of the supervised steps before GRPO, with the test accuracy before and after them."""
    tests = [e for e in (record.get("before_sft"), *evaluations(record, "test")[:1]) if e]
    reached = " → ".join(f"{100 * e['accuracy']:.1f}%" for e in tests)
    title = "Supervised steps before GRPO" + (f": test {reached}" if reached else "")
    supervised = {**record, "steps": record["sft"]}
    figure = _one_metric(supervised, "loss", BLUE, title, "loss", "mean over the step's completion tokens")
    figure.axes[0].set_xlabel("supervised step")
    return figure


def _one_metric(record: Record, name: str, colour: str, title: str, quantity: str, label: str) -> Figure:
    """Draw one metric, measured in nats a token, over the steps."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=12, parse_math=False)
    style.tidy(axes)
    axes.set_ylabel(f"{quantity} (nats a token{style.from_zero(axes, column(record, name))})")
    if style.line(axes, record, name, colour, _smoothed(record, label)):
        _legend(axes)
    else:
        style.note(axes, "not measured" if record["steps"] else NO_STEPS)
    axes.set_xlabel("step")
    style.whole_steps(axes)
    return figure


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=2, fontsize=9, frameon=False, borderaxespad=0.2)


def _smoothed(record: Record, label: str) -> str:
    """Return the label of a line, with ", smoothed" at its end if the line is smoothed."""
    return f"{label}, smoothed" if len(record["steps"]) >= SMOOTHED_FROM else label


def overview(record: Record) -> Figure:
    """Draw every metric of a run over its steps; numbered lines mark the findings, whose texts are below."""
    text_lines = _findings_in_words(record)
    figure = plt.figure(figsize=(WIDTH, 1))
    panels, flat = _panels(figure, record)
    if flat:
        text_lines = [*textwrap.wrap(f"Not drawn, because always 0: {', '.join(flat)}.", TEXT_COLUMNS), *text_lines]
    last = max([1, *(s["step"] for s in record["steps"]), *(e["step"] for e in record["evals"])])
    over_steps = [(number, axes) for number, (axes, _, has_steps) in enumerate(panels) if has_steps]
    lowest = {number % 2: axes for number, axes in over_steps}.values()  # the lowest panel of each column
    for _, axes in over_steps:
        margin = 0.35 if last < SMOOTHED_FROM else 0.01 * last  # few steps may be drawn as bars, which need room
        axes.set_xlim(-margin, last + margin)
        style.whole_steps(axes)
        axes.tick_params(labelbottom=axes in lowest)
        if axes in lowest:
            axes.set_xlabel("step", fontsize=TEXT, labelpad=1)
        _mark(axes, findings(record)[:MOST_FINDINGS], last)
    height = _arrange(figure, panels, FOOT + TEXT_LINE * (len(text_lines) + bool(text_lines)))
    _write(figure, record, text_lines, height)
    return figure


def _panels(figure: Figure, record: Record) -> tuple[list[tuple[Axes, str, bool]], list[str]]:
    """Draw the panels that have values; return them, and the titles of the panels whose metric is always 0.

    A panel is returned as its axes, its title, and whether its x axis shows the steps.
    """
    panels = []
    flat = []
    for number, (title, draw) in enumerate(PANELS):
        axes = figure.add_axes((0, 0, 1, 1), label=str(number))
        style.tidy(axes)
        axes.tick_params(labelsize=SMALL)
        remark = draw(axes, record)
        if remark == ZERO:
            flat.append(title.partition(" (")[0].lower())
        if remark in (None, ZERO):
            axes.remove()
        else:
            panels.append((axes, title + remark, draw is not skills))
    if not panels:
        axes = figure.add_axes((0, 0, 1, 1))
        style.tidy(axes)
        axes.tick_params(labelsize=SMALL)
        style.note(axes, NO_STEPS)
        panels.append((axes, PANELS[0][0], True))
    return panels, flat


def _arrange(figure: Figure, panels: Sequence[tuple[Axes, str, bool]], below: float) -> float:
    """Place panels in two columns, with space for the legends of each row; return the figure's height in inches.

    `below` is the height in inches of the text below the panels.
    """
    rows = []  # for each row of panels: the number of legend lines above it, and the space below it in inches
    for i in range(0, len(panels), 2):
        row = [axes for axes, *_ in panels[i : i + 2]]
        numbered = any(axes.xaxis.get_tick_params()["labelbottom"] for axes in row)
        rows.append((max(map(_rows_of_legend, row)), GAP + NUMBERS * numbered))
    height = TOP + sum(TITLE + LEGEND_LINE * lines + PANEL + under for lines, under in rows) + below
    figure.set_size_inches(WIDTH, height)
    place = TOP
    for number, (axes, title, _) in enumerate(panels):
        lines, under = rows[number // 2]
        top = place + TITLE + LEGEND_LINE * lines
        left = LEFT + number % 2 * (PANEL_WIDTH + BETWEEN)
        axes.set_position((left / WIDTH, 1 - (top + PANEL) / height, PANEL_WIDTH / WIDTH, PANEL / height))
        _head(axes, title, lines)
        if number % 2:
            place = top + PANEL + under
    return height


def _rows_of_legend(axes: Axes) -> int:
    """Return the number of lines that the legend of a panel takes."""
    labels = axes.get_legend_handles_labels()[1]
    return -(-len(labels) // _columns(labels))


def _write(figure: Figure, record: Record, text_lines: Sequence[str], height: float) -> None:
    """Write the title and the remarks above the panels, and lines of text below them."""
    figure.text(0.02, 1 - 0.10 / height, style.title_of(record), fontsize=LARGE, weight="bold", va="top")
    remarks = []
    if len(tests := evaluations(record, "test")) > 1:
        before, after = tests[0], tests[-1]
        remarks.append(f"Test {100 * before['accuracy']:.1f}% → {100 * after['accuracy']:.1f}% (n = {after['n']}).")
    if (steps := len(record["steps"])) >= SMOOTHED_FROM:
        remarks.append(f"Faint lines: single steps. Strong lines: smoothed over {window_for(steps)} steps.")
    figure.text(0.02, 1 - 0.32 / height, " ".join(remarks), fontsize=SMALL, color=GREY, va="top")
    top = TEXT_LINE * (len(text_lines) + 0.35)
    for number, text in enumerate(text_lines):
        place = (top - number * TEXT_LINE) / height
        figure.text(0.02, place, text, fontsize=SMALL, color=BLACK, va="top")


def _findings_in_words(record: Record) -> list[str]:
    """Return the findings as numbered lines of text."""
    entries = findings(record)
    lines = []
    for number, finding in enumerate(entries[:MOST_FINDINGS], 1):
        text = f"{number}  step {finding['step']}: {' '.join(finding['text'].split())}"
        limits = {"subsequent_indent": "     ", "max_lines": 3, "placeholder": " …", "break_on_hyphens": False}
        lines += textwrap.wrap(text, TEXT_COLUMNS, **limits)
    if len(entries) > MOST_FINDINGS:
        lines.append(f"{len(entries) - MOST_FINDINGS} more in the metrics file")
    return [style.plain(text, 2 * TEXT_COLUMNS) for text in lines]


def _mark(axes: Axes, entries: Sequence[Record], last: int) -> None:
    """Draw a thin numbered line at the step of each finding; findings that are close together share a label."""
    groups: list[tuple[int, list[int]]] = []  # for each label: its first step, and the numbers of its findings
    for number, finding in enumerate(entries, 1):
        step = finding["step"]
        if step > last:
            continue
        axes.axvline(step, color=BLACK, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        if groups and step - groups[-1][0] < NEAR * last:
            groups[-1][1].append(number)
        else:
            groups.append((step, [number]))
    for first, numbers in groups:
        text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
        step = min(max(first, 0.012 * last), 0.985 * last)
        box = {"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": BLACK, "linewidth": 0.6}
        where = axes.get_xaxis_transform()
        axes.text(step, 0.93, text, transform=where, fontsize=6, ha="center", va="center", bbox=box, zorder=6)


def _head(axes: Axes, title: str, lines: int) -> None:
    """Write the title of a panel, and below it the legend, which takes `lines` lines."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        spacing = {"borderaxespad": 0.1, "handlelength": 1.3, "columnspacing": 1, "labelspacing": 0.2}
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncol": _columns(labels)}
        axes.legend(handles, labels, fontsize=SMALL, frameon=False, **spacing, **place)
    axes.set_title(title, loc="left", fontsize=TEXT, weight="bold", pad=4 + 72 * LEGEND_LINE * lines)


def _columns(labels: Sequence[str]) -> int:
    """Return how many entries of a legend fit side by side in 300 points; a letter is about 4.4 points wide."""
    if sum(4.4 * len(label) + 26 for label in labels) < 300:
        return max(1, len(labels))
    return max(1, int(300 / (4.4 * max(map(len, labels)) + 26)))
