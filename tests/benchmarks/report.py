"""Turn the records of steps into numbers, tables and a plot."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib.pyplot as plt

from grpo.plots.style import AMBER, BLUE, GREEN, ORANGE, save_figure, tidy

PHASES = {"sampling": AMBER, "reward": GREEN, "scoring": ORANGE, "update": BLUE}
MIB = 2**20
Result = Mapping[str, Any]


def spread(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def summary(steps: Sequence[Result], turns: int) -> dict[str, Any]:
    """Return the figures of the steps of one program, and the steps without their problems."""
    size = len(steps) // turns
    seconds = [step["seconds"] for step in steps]
    totals: dict[str, Any] = {
        "seconds": spread(seconds),
        "by_turn": [median(seconds[i : i + size]) for i in range(0, len(seconds), size)],
        "phases": {name: median(step["phases"].get(name, 0.0) for step in steps) for name in PHASES},
        "tokens_per_second": median((s["prompt_tokens"] + s["completion_tokens"]) / s["seconds"] for s in steps),
        "completion_length": sum(s["completion_tokens"] for s in steps) / sum(s["completions"] for s in steps),
        "steps": [{name: value for name, value in step.items() if name != "problems"} for step in steps],
    }
    if "update_flops" in steps[0]:
        totals["update_rate"] = median(s["update_flops"] / s["update_seconds"] for s in steps)
    return totals


def ratio(result: Result) -> list[float]:
    """Return how many times longer a step of TRL takes: quartiles over pairs of neighbouring turns."""
    return spread([b / a for a, b in zip(result["ours"]["by_turn"], result["TRL"]["by_turn"], strict=True)])


def line(result: Result) -> str:
    """Return the result of a size as one line, to print while other sizes are measured."""
    ours = f"{result['name']}: {_seconds(result['ours']['seconds'])}"
    if "TRL" not in result:
        return ours
    return f"{ours}, TRL {_seconds(result['TRL']['seconds'])}, {ratio(result)[1]:.1f} times longer"


def race_line(run: Result) -> str:
    """Return a training to the target accuracy as one line."""
    last, done = run["curve"][-1], run["done"]
    end = "reached" if done else "not reached"
    return (
        f"{run['who']}, learning rate {run['rate']:g}, seed {run['seed']}: {100 * last['accuracy']:.1f}% at step "
        f"{last['step']}, after {last['seconds']:.1f} s ({end})"
    )


def fastest(runs: Sequence[Result], who: str) -> list[tuple[float, float]]:
    """Return the learning rate with the shortest median time over seeds, and this time; nothing if none arrives."""
    times: dict[float, list[float]] = {}
    for run in runs:
        if run["who"] == who:
            times.setdefault(run["rate"], []).append(run["done"]["seconds"] if run["done"] else inf)
    rate, seconds = min(((rate, median(of)) for rate, of in times.items()), key=lambda item: item[1])
    return [(rate, seconds)] if seconds < inf else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown that is also easy to read as text.

    >>> print(table(["a", "long"], [["1234", "5"]]))
    | a    | long |
    |------|------|
    | 1234 | 5    |
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([first, rule, *rest])


def markdown(results: Result) -> str:
    """Return all results in tables."""
    parts = [_environment(results), _sizes(results["sizes"]), _phases(results["sizes"]), _share(results["sizes"])]
    if results.get("shared_prefix"):
        parts.append("Updates, shared prefix against the dense path:\n\n" + _shared(results["shared_prefix"]))
    if results["race"]:
        parts.append(
            "Training time to 97% on validation (greedy, n = 500; no evaluation counted):\n\n" + _race(results)
        )
    return "\n\n".join(parts) + "\n"


def plot(results: Result, path: Path) -> Path:
    """Draw step times by phase, with a bar for each program at each size, and how many times longer TRL takes."""
    sizes = results["sizes"]
    figure, axes = plt.subplots(figsize=(max(6.0, 2.5 + 1.15 * len(sizes)), 4.8), layout="constrained")
    ticks, names, top = [], [], max(side["seconds"][1] for s in sizes for side in _sides(s).values())
    for i, result in enumerate(sizes):
        heights = []
        for j, (who, side) in enumerate(_sides(result).items()):
            bottom, x = 0.0, 2.6 * i + j
            for phase, colour in PHASES.items():
                label = {"scoring": "reference (TRL: and sampler)"}.get(phase, phase) if i + j == 0 else None
                axes.bar(x, side["phases"][phase], 0.86, bottom, color=colour, alpha=1 - 0.35 * j, label=label)
                bottom += side["phases"][phase]
            ticks, names, heights = [*ticks, x], [*names, who], [*heights, bottom]
        if "TRL" in result:
            where = (2.6 * i + 0.5, max(heights) + 0.02 * top)
            axes.annotate(f"{ratio(result)[1]:.1f}×", where, ha="center", va="bottom", weight="bold")
        below = result["name"].replace(" arith", "\narith").replace(" P=", "\nP=")
        axes.annotate(below, (2.6 * i + 0.5, 0), (0, -20), "data", "offset points", ha="center", va="top", fontsize=8)
    axes.set_xticks(ticks, names, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("\n\n")  # room for the names of the sizes
    axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("seconds a step (median)")
    tidy(axes)
    axes.grid(axis="x", visible=False)
    figure.suptitle("Time of a step of GRPO: rollout, reference, all updates", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return save_figure(figure, path)


def _sides(result: Result) -> dict[str, Any]:
    return {who: result[who] for who in ("ours", "TRL") if who in result}


def _seconds(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.2f} s ({low:.2f} to {high:.2f})"


def _environment(results: Result) -> str:
    h, sides = results["hardware"], _sides(results["sizes"][0])
    about = {who: side["about"] for who, side in sides.items()}
    versions = {name: version for one in about.values() for name, version in one["versions"].items()}
    ours = about["ours"]
    where = f"on {ours['cuda']}" if ours["cuda"] else f"{ours['threads']} threads"
    return (
        f"{h['cpu']}, {h['cores']} cores, {where}; {ours['weights']} weights; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Medians, with quartiles, of {results['turns']} turns of {results['steps']} steps each, alternating."
    )


def _sizes(sizes: Sequence[Result]) -> str:
    head = [
        "size",
        "who",
        "a step",
        "TRL / ours",
        "tokens a second",
        "completion",
        "peak memory",
        "of it in training",
    ]
    rows = []
    for result in sizes:
        for who, side in _sides(result).items():
            low, middle, high = ratio(result) if who == "TRL" else (0, 0, 0)
            times = f"{middle:.2f} ({low:.2f} to {high:.2f})" if who == "TRL" else ""
            peak, loaded = side["memory"], side["about"]["memory"]
            memory = [f"{peak / MIB:.0f} MiB", f"{(peak - loaded) / MIB:.0f} MiB"] if peak else ["?", "?"]
            length = f"{side['completion_length']:.1f} tokens"
            tokens = f"{side['tokens_per_second']:.0f}"
            rows.append([result["name"], who, _seconds(side["seconds"]), times, tokens, length, *memory])
    return table(head, rows)


def _phases(sizes: Sequence[Result]) -> str:
    rows = [
        [result["name"], who, *(f"{1000 * side['phases'][phase]:.0f} ms" for phase in PHASES)]
        for result in sizes
        for who, side in _sides(result).items()
    ]
    return "Phases (update: and all the rest of a step):\n\n" + table(["size", "who", *PHASES], rows)


def _share(sizes: Sequence[Result]) -> str:
    rows = []
    for result in sizes:
        shape, best = max(result["rates"].items(), key=lambda item: item[1])
        done = result["ours"]["update_rate"]
        rows.append([result["name"], f"{done / 1e9:.1f}", f"{best / 1e9:.1f} ({shape})", f"{100 * done / best:.0f}%"])
    head = ["size", "update, GFLOP/s", "matrix product, GFLOP/s", "share"]
    return "Updates of ours beside the fastest matrix product, of the model's shapes and a square:\n\n" + table(
        head, rows
    )


def _shared(rows: Sequence[Result]) -> str:
    head = ["batch", "dense", "shared", "times faster", "bound by tokens"]
    cells = []
    for row in rows:
        low, high = row["quartiles"]
        dense, shared = (f"{1000 * row[kind]:.0f} ms" for kind in ("dense", "shared"))
        faster = f"{row['dense'] / row['shared']:.2f} ({low:.2f} to {high:.2f})"
        cells.append([row["name"], dense, shared, faster, f"{row['bound']:.2f}"])
    return table(head, cells)


def _race(results: Result) -> str:
    def reached(run: Result) -> str:
        done = run["done"]
        return f"{done['seconds']:.1f} s, step {done['step']}" if done else f"not in {run['curve'][-1]['step']} steps"

    places = list(dict.fromkeys((run["rate"], run["seed"]) for run in results["race"]))
    whos = list(dict.fromkeys(run["who"] for run in results["race"]))
    of = {(run["who"], run["rate"], run["seed"]): reached(run) for run in results["race"]}
    rows = [[f"{rate:g}", str(seed), *(of[who, rate, seed] for who in whos)] for rate, seed in places]
    best = [f"{who} {seconds:.1f} s ({rate:g})" for who in whos for rate, seconds in fastest(results["race"], who)]
    said = f"\n\nThe best learning rate of each: {', '.join(best)}." if best else ""
    return table(["learning rate", "seed", *whos], rows) + said
