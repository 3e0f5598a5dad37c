"""The figures of a run, drawn from its metrics. Raw values are faint, the smoothed line is strong."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo.files import writing

# Okabe and Ito's palette, told apart with any colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
CURVE, KL = "grpo_training_curve.png", "grpo_kl_divergence.png"


def draw_all(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw both figures into a folder; returns what was written."""
    paths = []
    for name, figure in ((CURVE, training_curve(record)), (KL, kl_divergence(record))):
        temporary = folder / f".{name}"
        try:
            with writing(folder / name):
                figure.savefig(temporary, dpi=150, format="png")
                temporary.replace(folder / name)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            plt.close(figure)
        paths.append(folder / name)
    return paths


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """A centred moving average that gets shorter at the ends; NaN is left out of every average."""
    array = np.asarray(values, dtype=float)
    half = window // 2
    known = np.where(np.isfinite(array), array, 0.0)
    count = np.isfinite(array).astype(float)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.pad(known, half), kernel, "valid")
    n = np.convolve(np.pad(count, half), kernel, "valid")
    return np.divide(total, n, out=np.full_like(array, np.nan), where=n > 0)


def column(record: Mapping[str, Any], name: str) -> np.ndarray:
    """One metric of every step; NaN where it is null or missing."""
    values = [step.get(name) for step in record["steps"]]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def training_curve(record: Mapping[str, Any]) -> Figure:
    """Reward over steps above, accuracy below: sampled, and held-out with its interval and the start."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.4), layout="constrained")
    config = record["config"]
    title = f"GRPO on {config.get('model', '?')}, seed {config.get('seed', '?')}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    _line(top, record, "reward_mean", BLUE, "reward, mean of the step")
    top.set_ylabel("reward (0 to 1)")
    top.set_ylim(0, 1.05)
    _legend(top)
    _line(bottom, record, "accuracy", BLUE, "sampled completions (training problems)")
    _held_out(bottom, record)
    bottom.set_ylabel("exact answers (% of problems)")
    bottom.set_ylim(0, 1.05)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(bottom)
    return figure


def kl_divergence(record: Mapping[str, Any]) -> Figure:
    """KL of the policy to the reference over steps."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    config = record["config"]
    figure.suptitle(f"KL to the frozen reference, beta {config.get('beta', '?')}", fontsize=12)
    _line(axes, record, "kl", ORANGE, "k3, mean over the step's completion tokens")
    axes.set_ylabel("KL (nats a token)")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, "upper left")
    return figure


def _line(axes: Axes, record: Mapping[str, Any], name: str, colour: str, label: str) -> None:
    steps, values = column(record, "step"), column(record, name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color=GREY)
        return
    window = max(5, len(values) // 20)
    if len(values) < 10:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(values, window), color=colour, linewidth=2, label=f"{label}, smoothed")


def _held_out(axes: Axes, record: Mapping[str, Any]) -> None:
    points = [entry for entry in record["evals"] if entry.get("split") == "validation"]
    if points:
        low = [max(0.0, entry["accuracy"] - entry["ci_low"]) for entry in points]  # rounding can give -1e-17
        high = [max(0.0, entry["ci_high"] - entry["accuracy"]) for entry in points]
        axes.errorbar(
            [entry["step"] for entry in points],
            [entry["accuracy"] for entry in points],
            yerr=[low, high],
            color=ORANGE,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.4,
            label=f"validation, greedy, 95% interval (n = {points[0]['n']})",
            zorder=3,
        )
        start = points[0]["accuracy"]
        axes.axhline(start, color=GREY, linestyle="--", linewidth=1, label=f"start: {100 * start:.1f}%")
    tests = [entry for entry in record["evals"] if entry.get("split") == "test"]
    if len(tests) > 1:
        last = tests[-1]
        axes.plot(
            last["step"],
            last["accuracy"],
            color=GREEN,
            marker="D",
            markersize=7,
            linestyle="none",
            label=f"test, saved model: {100 * last['accuracy']:.1f}% (n = {last['n']})",
            zorder=4,
        )


def _legend(axes: Axes, place: str = "lower right") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, fontsize=9, framealpha=0.9)
