"""The panels of the overview: each draws one aspect of a run and returns a remark for its title.

One that has nothing to draw returns None instead, a share that is 0 throughout ZERO; both are left out. A metric of
`STEP_METRICS` with a title that no panel here draws gets a panel of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from grpo.plots.series import SMOOTHED_FROM, Record, column, evaluations, phases, reward_parts, smooth, window_for
from grpo.plots.style import (
    AMBER,
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    PINK,
    SKY,
    THIN,
    drawable,
    fitting_shares,
    from_zero,
    held_out,
    line,
    plain,
    setting,
    shares,
)
from grpo.record.schema import few_categories
from grpo.record.step_metrics import STEP_METRICS, metric_title

MOST_PARTS = 11  # of a reward
STYLES = ("-", "--")  # of the first parts that have a colour each, and of the others
LEAST_LAYER = 0.005  # of a stack: a layer that is nowhere thicker is not seen, and has no place in the legend
ZERO = "0 throughout"
Panel = Callable[[Axes, Record], str | None]


def _reward(axes: Axes, record: Record) -> str | None:
    names = reward_parts(record)
    for i, name in enumerate(names[:MOST_PARTS]):
        line(axes, record, f"reward/{name}", COLOURS[i % len(COLOURS)], short(name), STYLES[i // len(COLOURS)])
    drawn = line(axes, record, "reward_mean", BLACK, "all")
    values = np.concatenate([column(record, name) for name in ("reward_mean", *(f"reward/{n}" for n in names))])
    known = drawable(values)[np.isfinite(drawable(values))]
    axes.set_ylim(min([0, *(1.05 * known)]), max([1.05, *(1.05 * known)]))
    return _remark(drawn)


def _accuracy(axes: Axes, record: Record) -> str | None:
    drawn = line(axes, record, "accuracy", BLUE, "sampled")
    held_out(axes, record, "validation, 95% interval", 4)
    tests = evaluations(record, "test")
    if tests:
        x, y = [e["step"] for e in tests], [e["accuracy"] for e in tests]
        axes.plot(x, y, color=GREEN, marker="D", markersize=6, linestyle="none", label="test", zorder=4)
    shares(axes)
    return _remark(drawn or bool(record["evals"]))


def _number(name: str, colour: str) -> Panel:
    """Return a panel of a metric on an axis that starts at 0."""

    def draw(axes: Axes, record: Record) -> str | None:
        scale = from_zero(axes, column(record, name))
        return _remark(line(axes, record, name, colour), scale)

    return draw


def _share(name: str, colour: str) -> Panel:
    """Return a panel of a metric from 0 to 1, in %; the axis is shorter if all values are small."""

    def draw(axes: Axes, record: Record) -> str | None:
        drawn = line(axes, record, name, colour)
        fitting_shares(axes, column(record, name))
        return _remark(drawn) if np.nan_to_num(column(record, name)).any() or not drawn else ZERO

    return draw


def _ratio(axes: Axes, record: Record) -> str | None:
    values = np.concatenate([drawable(column(record, name)) for name in ("ratio_max", "ratio_min")])
    known = values[np.isfinite(values) & (values > 0)]
    far = len(known) > 0 and known.max() > 10
    low, high = setting(record, "epsilon"), setting(record, "epsilon_high") or setting(record, "epsilon")
    if far:  # with limits before anything is drawn: matplotlib 3.11 warns about an axis of no height otherwise
        axes.set_yscale("log")
        axes.set_ylim(min([max(0.1, 1 - 1.3 * low), *(known / 1.3)]), 1.3 * known.max())
    drawn = line(axes, record, "ratio_max", BLUE, "largest") | line(axes, record, "ratio_min", SKY, "smallest")
    for edge, label in ((1 - low, "clipping begins"), (1 + high, None)):
        axes.axhline(edge, color=GREY, linestyle=":", linewidth=THIN, label=label)
    if far:
        return _remark(drawn, ", log")
    axes.set_ylim(min([1 - 1.3 * low, *known]), max([1 + 1.3 * high, *(1.05 * known)]))
    return _remark(drawn)


def _length(axes: Axes, record: Record) -> str | None:
    drawn = line(axes, record, "completion_length", BLUE, "mean")
    limit = setting(record, "max_new_tokens")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=THIN, label="the limit")
    axes.set_ylim(0, 1.08 * limit)
    return _remark(drawn)


def _gradient(axes: Axes, record: Record) -> str | None:
    limit = setting(record, "clip_grad_norm")
    scale = from_zero(axes, np.append(column(record, "grad_norm"), limit))
    drawn = line(axes, record, "grad_norm", BLUE, "mean of the updates")
    axes.axhline(limit, color=GREY, linestyle=":", linewidth=THIN, label="clipped above")
    return _remark(drawn, scale)


def _tied(axes: Axes, record: Record) -> str | None:
    right, wrong = (column(record, f"tied_all_{kind}_fraction") for kind in ("right", "wrong"))
    tied = column(record, "tied_groups_fraction")
    other = np.maximum(0, tied - np.nan_to_num(right) - np.nan_to_num(wrong))
    layers = [("all right", right, GREEN), ("all wrong", wrong, ORANGE), ("other", other, GREY)]
    shares(axes)
    return _remark(_stack(axes, record, layers))


def _loss(axes: Axes, record: Record) -> str | None:
    drawn = line(axes, record, "loss", BLUE)
    axes.axhline(0, color=GREY, linewidth=THIN)
    values = drawable(column(record, "loss"))
    most = np.abs(values[np.isfinite(values)]).max(initial=1e-3)
    axes.set_ylim(-1.1 * most, 1.1 * most)
    axes.yaxis.set_major_formatter("{x:g}")
    return _remark(drawn)


def _time(axes: Axes, record: Record) -> str | None:
    colours = {"sample": BLUE, "reward": PINK, "reference": AMBER, "update": GREEN}
    layers = [(name, column(record, f"time/{name}"), colours.get(name, SKY)) for name in phases(record)]
    inside = [np.nan_to_num(values) for name, values, _ in layers if name != "save"]  # saving follows the step
    rest = column(record, "time/total") - sum(inside)
    layers.append(("other", np.maximum(0, rest), GREY))
    drawn = _stack(axes, record, [(short(name), values, colour) for name, values, colour in layers])
    axes.set_ylim(bottom=0)
    return _remark(drawn)


def _drift(axes: Axes, record: Record) -> str | None:
    points = [e for e in record["evals"] if e.get("drift") is not None]
    points = evaluations({"evals": points}, "validation") or points
    values = [e["drift"] for e in points]
    axes.plot([e["step"] for e in points], values, color=PINK, marker="o", markersize=4.5, linewidth=LINE)
    return from_zero(axes, np.array(values, dtype=float)) if points else None


def skills(axes: Axes, record: Record) -> str | None:
    """Draw each neighbouring skill before and after, on an axis of its own."""
    tests = [e for e in evaluations(record, "test") if isinstance(e.get("skills"), dict) and e["skills"]]
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if not tests:
        return None
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
        style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none", "elinewidth": LINE}
        axes.errorbar(middle, [i + away for i, _ in rows], xerr=reach, label=label, clip_on=False, **style)
    axes.set_yticks(range(len(names)), [plain(name, 12) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    return ""


def short(name: str) -> str:
    """Shorten a name for a legend; matplotlib leaves out what begins with an underscore."""
    return plain(name if not name.startswith("_") else " " + name, 16)


def _stack(axes: Axes, record: Record, layers: Sequence[tuple[str, np.ndarray, str]]) -> bool:
    """Draw layers on top of each other: smoothed areas, or bars if there are few steps."""
    steps = column(record, "step")
    layers = [(name, drawable(values), colour) for name, values, colour in layers]
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
    axes.stackplot(
        steps, heights, labels=[n for n, _, _ in layers], colors=[c for _, _, c in layers], alpha=0.85, linewidth=0
    )
    return True


def _remark(drawn: bool, remark: str = "") -> str | None:
    return remark if drawn else None


def _of_table() -> tuple[tuple[str, Panel], ...]:
    """Return a panel for each metric of the table with a title that no panel has yet."""
    new = [metric for metric in STEP_METRICS if metric.title and metric.name not in DRAWN]
    return tuple((metric_title(m.name), (_share if m.scale == "share" else _number)(m.name, BLUE)) for m in new)


def _by_category(axes: Axes, record: Record) -> str | None:
    points = [(e["step"], name, e) for e in evaluations(record, "validation") for name in few_categories(e)]
    names = list(dict.fromkeys(name for _, name, _ in points))
    for i, name in enumerate(names):
        steps = [step for step, of, _ in points if of == name]
        values = [entry["categories"][name]["accuracy"] for _, of, entry in points if of == name]
        axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], label=short(name), marker="o", markersize=4.5)
    shares(axes)
    return _remark(bool(names))


DRAWN = {"reward_mean", "accuracy", "kl", "entropy", "clip_fraction", "completion_length", "truncated_fraction"}
DRAWN |= {"grad_norm", "tied_groups_fraction"}
PANELS: tuple[tuple[str, Panel], ...] = (
    ("Reward by part (mean of the step)", _reward),
    ("Exact answers (% of problems)", _accuracy),
    (metric_title("kl"), _number("kl", ORANGE)),
    (metric_title("entropy"), _number("entropy", BLUE)),
    (metric_title("clip_fraction"), _share("clip_fraction", BLUE)),
    ("Ratio to the sampling policy", _ratio),
    (metric_title("completion_length"), _length),
    (metric_title("truncated_fraction"), _share("truncated_fraction", ORANGE)),
    (metric_title("grad_norm"), _gradient),
    (metric_title("tied_groups_fraction"), _tied),
    ("Accuracy by category (% of validation problems)", _by_category),
    *_of_table(),
    ("Loss (near 0 is normal)", _loss),
    ("Time of a step (seconds)", _time),
    ("Forgetting: drift from the start (nats a token)", _drift),
    ("Forgetting: neighbouring skills (% right)", skills),
)
