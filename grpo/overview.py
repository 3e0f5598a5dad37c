"""One picture of a whole run: what it learned, how far it went, what it cost and forgot, and what was found."""

import textwrap
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from grpo.curves import (
    SMOOTHED_FROM,
    Record,
    column,
    evaluations,
    findings,
    phases,
    reward_parts,
    smooth,
    window_for,
)
from grpo.drawing import (
    AMBER,
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    drawable,
    from_zero,
    held_out,
    line,
    note,
    plain,
    setting,
    shares,
    tidy,
    title_of,
    whole_steps,
)

WIDTH, ROW, HEAD, FOOT, TEXT_LINE = 8.8, 1.6, 0.88, 0.45, 0.165  # inches; a README shows the width as 880 pixels
SMALL, TEXT, LARGE = 7.5, 8.5, 11  # points
LETTERS = 145  # of a line of findings
MOST_FINDINGS, MOST_PARTS = 12, 11
NEAR = 0.035  # of the steps: findings closer than this share a marker


def overview(record: Record) -> Figure:
    """Every metric of a run over its steps, its findings as numbered lines and in words below."""
    found, words = findings(record)[:MOST_FINDINGS], _in_words(record)
    labels = [*(_short(name) for name in reward_parts(record)[:MOST_PARTS]), "all"]
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
        over_steps = draw is not _skills
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


def _reward(axes: Axes, record: Record) -> str:
    names = reward_parts(record)
    for i, name in enumerate(names[:MOST_PARTS]):
        style = "-" if i < len(COLOURS) else "--"
        line(axes, record, f"reward/{name}", COLOURS[i % len(COLOURS)], _short(name), style)
    drawn = line(axes, record, "reward_mean", BLACK, "all")
    values = np.concatenate([column(record, name) for name in ("reward_mean", *(f"reward/{n}" for n in names))])
    known = drawable(values)[np.isfinite(drawable(values))]
    axes.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))
    return _or_note(axes, drawn, record)


def _accuracy(axes: Axes, record: Record) -> str:
    drawn = line(axes, record, "accuracy", BLUE, "sampled")
    held_out(axes, record, "validation, 95% interval", 3)
    tests = evaluations(record, "test")
    if tests:
        x, y = [e["step"] for e in tests], [e["accuracy"] for e in tests]
        axes.plot(x, y, color=GREEN, marker="D", markersize=4.5, linestyle="none", label="test", zorder=4)
    shares(axes)
    return "" if tests or record["evals"] else _or_note(axes, drawn, record)


def _number(name: str, colour: str) -> Callable[[Axes, Record], str]:
    """A metric on an axis that starts at 0."""

    def draw(axes: Axes, record: Record) -> str:
        scale = from_zero(axes, column(record, name))
        return scale + _or_note(axes, line(axes, record, name, colour), record)

    return draw


def _share(name: str, colour: str) -> Callable[[Axes, Record], str]:
    """A metric from 0 to 1, in %; the axis is shorter where all values are small."""

    def draw(axes: Axes, record: Record) -> str:
        drawn = line(axes, record, name, colour)
        values = column(record, name)
        most = values[np.isfinite(values)].max() if drawn else 1.0
        shares(axes, next(top for top in (0.0105, 0.105, 1.05) if most <= top / 1.05 or top > 1))
        return _or_note(axes, drawn, record)

    return draw


def _ratio(axes: Axes, record: Record) -> str:
    values = np.concatenate([drawable(column(record, name)) for name in ("ratio_max", "ratio_min")])
    known = values[np.isfinite(values) & (values > 0)]
    far = len(known) > 0 and known.max() > 10
    if far:
        axes.set_yscale("log")
    drawn = line(axes, record, "ratio_max", BLUE, "largest") | line(axes, record, "ratio_min", SKY, "smallest")
    low, high = setting(record, "epsilon"), setting(record, "epsilon_high") or setting(record, "epsilon")
    for edge, label in ((1 - low, "clipping begins"), (1 + high, None)):
        axes.axhline(edge, color=GREY, linestyle=":", linewidth=1, label=label)
    if far:
        return ", log"
    axes.set_ylim(min([1 - 1.3 * low, *known]), max([1 + 1.3 * high, *(1.05 * known)]))
    return _or_note(axes, drawn, record)


def _length(axes: Axes, record: Record) -> str:
    drawn = line(axes, record, "completion_length", BLUE, "mean")
    limit = setting(record, "max_new_tokens")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=1, label="the limit")
    axes.set_ylim(0, 1.08 * limit)
    return _or_note(axes, drawn, record)


def _gradient(axes: Axes, record: Record) -> str:
    limit = setting(record, "clip_grad_norm")
    scale = from_zero(axes, np.append(column(record, "grad_norm"), limit))
    drawn = line(axes, record, "grad_norm", BLUE, "mean of the updates")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=1, label="clipped above")
    return scale + _or_note(axes, drawn, record)


def _tied(axes: Axes, record: Record) -> str:
    right, wrong = (column(record, f"tied_all_{kind}_fraction") for kind in ("right", "wrong"))
    tied = column(record, "tied_groups_fraction")
    other = np.maximum(0, tied - np.nan_to_num(right) - np.nan_to_num(wrong))
    layers = [("all right", right, GREEN), ("all wrong", wrong, ORANGE), ("other", other, GREY)]
    shares(axes)
    return _or_note(axes, _stack(axes, record, layers), record)


def _loss(axes: Axes, record: Record) -> str:
    drawn = line(axes, record, "loss", BLUE)
    axes.axhline(0, color=GREY, linewidth=0.8)
    values = drawable(column(record, "loss"))
    most = np.abs(values[np.isfinite(values)]).max(initial=1e-3)
    axes.set_ylim(-1.1 * most, 1.1 * most)
    axes.yaxis.set_major_formatter("{x:g}")
    return _or_note(axes, drawn, record)


def _time(axes: Axes, record: Record) -> str:
    colours = {"sample": BLUE, "reward": PINK, "reference": AMBER, "update": GREEN}
    layers = [(name, column(record, f"time/{name}"), colours.get(name, SKY)) for name in phases(record)]
    rest = column(record, "time/total") - sum(np.nan_to_num(values) for _, values, _ in layers)
    layers.append(("other", np.maximum(0, rest), GREY))
    drawn = _stack(axes, record, [(_short(name), values, colour) for name, values, colour in layers])
    axes.set_ylim(bottom=0)
    return _or_note(axes, drawn, record)


def _drift(axes: Axes, record: Record) -> str:
    points = [e for e in record["evals"] if e.get("drift") is not None]
    points = evaluations({"evals": points}, "validation") or points
    values = [e["drift"] for e in points]
    axes.plot([e["step"] for e in points], values, color=PINK, marker="o", markersize=3, linewidth=1.6)
    if not points:
        note(axes, "not measured")
        axes.set_ylim(0, 1)
        return ""
    return from_zero(axes, values)


def _skills(axes: Axes, record: Record) -> str:
    """Each neighbouring skill before and after; an axis of its own."""
    tests = [e for e in evaluations(record, "test") if isinstance(e.get("skills"), dict) and e["skills"]]
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if not tests:
        note(axes, "this model has none, or they are not measured yet")
        axes.set_yticks([])
        return ""
    names = list(tests[0]["skills"])
    moments = [(tests[0], GREY, "o", "before", 0.16)]
    if len(tests) > 1:
        moments.append((tests[-1], BLUE, "o", "after", -0.16))
    for entry, colour, marker, label, away in moments:
        rows = [(i, entry["skills"].get(name, {})) for i, name in enumerate(reversed(names))]
        rows = [(i, skill) for i, skill in rows if isinstance(skill, dict) and skill.get("accuracy") is not None]
        middle = [skill["accuracy"] for _, skill in rows]
        reach = [[max(0, skill["accuracy"] - skill.get("ci_low", 1)) for _, skill in rows]]
        reach.append([max(0, skill.get("ci_high", 0) - skill["accuracy"]) for _, skill in rows])
        style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none", "elinewidth": 1.4}
        axes.errorbar(middle, [i + away for i, _ in rows], xerr=reach, label=label, clip_on=False, **style)
    axes.set_yticks(range(len(names)), [plain(name, 12) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    return ""


def _short(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    return plain(name if not name.startswith("_") else " " + name, 16)


def _stack(axes: Axes, record: Record, layers: Sequence[tuple[str, np.ndarray, str]]) -> bool:
    """Layers on top of each other: areas, smoothed, or bars where steps are few."""
    steps = column(record, "step")
    layers = [(name, drawable(values), colour) for name, values, colour in layers]
    layers = [layer for layer in layers if np.isfinite(layer[1]).any()]
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
    axes.stackplot(
        steps, heights, labels=[n for n, _, _ in layers], colors=[c for _, _, c in layers], alpha=0.85, linewidth=0
    )
    return True


def _or_note(axes: Axes, drawn: bool, record: Record) -> str:
    if not drawn:
        note(axes, "not in this file" if record["steps"] else "no steps yet")
    return ""


PANELS: tuple[tuple[str, Callable[[Axes, Record], str]], ...] = (
    ("Reward by part (mean of the step)", _reward),
    ("Exact answers (% of problems)", _accuracy),
    ("KL to the reference (nats a token)", _number("kl", ORANGE)),
    ("Entropy (nats a token)", _number("entropy", BLUE)),
    ("Clipped (% of tokens)", _share("clip_fraction", BLUE)),
    ("Ratio to the sampling policy", _ratio),
    ("Completion length (tokens)", _length),
    ("Truncated (% of completions)", _share("truncated_fraction", ORANGE)),
    ("Gradient norm", _gradient),
    ("Tied groups, which teach nothing (% of groups)", _tied),
    ("Loss (near 0 is normal)", _loss),
    ("Time of a step (seconds)", _time),
    ("Forgetting: drift from the start (nats a token)", _drift),
    ("Forgetting: neighbouring skills (% right)", _skills),
)
