"""One picture of a whole run: what it learned, how far it went, what it cost and forgot, and what was found."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grpo.curves import SMOOTHED_FROM, Record, evaluations, findings, reward_parts, window_for
from grpo.drawing import BLACK, GREY, plain, tidy, title_of, whole_steps
from grpo.panels import MOST_PARTS, PANELS, short, skills

WIDTH, ROW, HEAD, FOOT, TEXT_LINE = 8.8, 1.6, 0.88, 0.45, 0.165  # inches; a README shows the width as 880 pixels
SMALL, TEXT, LARGE = 7.5, 8.5, 11  # points
LETTERS = 145  # of a line of findings
MOST_FINDINGS = 12
NEAR = 0.035  # of the steps: findings closer than this share a marker


def overview(record: Record) -> Figure:
    """Every metric of a run over its steps, its findings as numbered lines and in words below."""
    found, words = findings(record)[:MOST_FINDINGS], _in_words(record)
    labels = [*(short(name) for name in reward_parts(record)[:MOST_PARTS]), "all"]
    head = HEAD + 0.16 * ((len(labels) - 1) // _columns(labels))
    rows = -(-len(PANELS) // 2)
    height = head + rows * ROW + FOOT + TEXT_LINE * (len(words) + bool(words))
    figure = plt.figure(figsize=(WIDTH, height))
    below = (FOOT + TEXT_LINE * (len(words) + bool(words))) / height
    grid = figure.add_gridspec(
        rows, 2, left=0.065, right=0.985, top=1 - head / height, bottom=below, hspace=0.62, wspace=0.16
    )
    axes: list[Axes] = []
    last = max([1, *(s["step"] for s in record["steps"]), *(e["step"] for e in record["evals"])])
    for number, (title, draw) in enumerate(PANELS):
        over_steps = draw is not skills
        one = figure.add_subplot(grid[number // 2, number % 2], sharex=axes[0] if axes and over_steps else None)
        axes.append(one)
        tidy(one)
        one.tick_params(labelsize=SMALL)
        _head(one, title + draw(one, record))
        if over_steps:
            aside = 0.35 if last < SMOOTHED_FROM else 0.01 * last  # half a bar
            one.set_xlim(-aside, last + aside)
            whole_steps(one)
            one.tick_params(labelbottom=number >= len(PANELS) - 3)
            _mark(one, found, last)
    axes[-2].set_xlabel("step", fontsize=TEXT, labelpad=1)
    _write(figure, record, words, height)
    return figure


def _write(figure: Figure, record: Record, words: Sequence[str], height: float) -> None:
    """What stands above and below the panels."""
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
    """The findings as numbered lines."""
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
    """A thin line with its number at the step of each finding; those close together share a number."""
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
    """The panel's title, and its legend between title and axes, where it covers nothing."""
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
    """How many entries of a legend fit beside each other, from what letters and signs take, in points."""
    if sum(4.4 * len(label) + 26 for label in labels) < 300:
        return max(1, len(labels))
    return max(1, int(300 / (4.4 * max(map(len, labels)) + 26)))
