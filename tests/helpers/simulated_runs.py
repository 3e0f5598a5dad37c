"""Simulated runs, healthy and ill, in milliseconds: records as `grpo_metrics.json` has them.

Abilities, ties and rewards are simulated; what else a step shows (entropy, KL, length, gradient, ...) is drawn from
the steps of real default runs of the starter at a like accuracy (tests/fixtures/healthy_seed_*.json).
"""

import json
import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from grpo.evaluation.intervals import wilson_interval

FIXTURES = Path(__file__).parents[1] / "fixtures"
RIGHT, WRONG = [(1.0, 1.0)], [(0.4, 0.3), (0.2, 0.7)]  # total rewards and their shares, as the starter's are
SPREAD = 8  # of abilities over problems: a Beta distribution of this concentration ties as many groups as real runs
COPIED = ("entropy", "kl", "completion_length", "clip_fraction", "weights_moved", "sampler_gap", "grad_norm")
EVAL_EVERY = 20

Row = dict[str, Any]
Curve = Callable[[float], float]  # from the share of the run that is over to the accuracy


@dataclass(frozen=True)
class Setting:
    """The shape of a run: prompts, completions each, beta, validation problems, steps."""

    batch: int
    group: int
    beta: float = 0.04
    n: int = 200
    steps: int = 200


@cache
def real_steps() -> list[Row]:
    """Return the steps of the real runs, by accuracy."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIXTURES.glob("healthy_seed_*.json"))]
    return sorted((row for run in runs for row in run["steps"]), key=lambda row: row["accuracy"])


@cache
def accuracies() -> list[float]:
    """Return the accuracies of the real steps, ascending."""
    return [row["accuracy"] for row in real_steps()]


def learning(start: float, end: float, speed: float = 4.0) -> Curve:
    """Return an accuracy that rises from `start` towards `end`."""
    return lambda done: end - (end - start) * (1 - done) ** speed


def group_of(rng: random.Random, size: int, ability: float) -> tuple[list, list]:
    """Simulate a group of a policy with this accuracy: rewards and whether right, each (G,)."""
    ability = min(max(ability, 1e-4), 1 - 1e-4)
    p = rng.betavariate(SPREAD * ability, SPREAD * (1 - ability))
    right = [rng.random() < p for _ in range(size)]
    kinds = [RIGHT if one else WRONG for one in right]
    return [rng.choices(*zip(*kind, strict=True))[0] for kind in kinds], right


def step_of(rng: random.Random, setting: Setting, number: int, ability: float) -> Row:
    """Simulate a step of a policy with this accuracy."""
    made = [group_of(rng, setting.group, ability) for _ in range(setting.batch)]
    return step_from(rng, setting, number, *map(list, zip(*made, strict=True)))


def step_from(rng: random.Random, setting: Setting, number: int, rewards: list, right: list) -> Row:
    """Return the entry of a step with these rewards by group, and everything else from a real one."""
    accuracy = fmean(one for group in right for one in group)
    tied = [max(group) == min(group) for group in rewards]
    known = real_steps()
    like = bisect(accuracies(), accuracy)
    real = known[max(0, min(len(known) - 1, like + rng.randint(-8, 8)))]
    noise = sqrt(64 / (setting.batch * setting.group))
    row = {name: real[name] for name in COPIED} | {
        "step": number,
        "reward_mean": fmean(r for group in rewards for r in group),
        "reward_std": fmean(map(stdev, rewards)),
        "accuracy": accuracy,
        "tied_groups_fraction": fmean(tied),
        "tied_all_right_fraction": fmean(t and all(g) for t, g in zip(tied, right, strict=True)),
        "tied_all_wrong_fraction": fmean(t and not any(g) for t, g in zip(tied, right, strict=True)),
        "empty_fraction": 0.0,
        "truncated_fraction": fmean(rng.random() < 0.01 for _ in range(setting.batch * setting.group)),
        "repeated_endings_fraction": 0.0,
        "skipped_updates": 0,
        "learning_rate": 3e-6,
        "num_generations": setting.group,
    }
    # The variance of -log p was 1.3 to 1.9 times the entropy in default runs.
    tokens = setting.batch * setting.group * row["completion_length"]
    row["entropy_gap_error"] = sqrt(1.7 * row["entropy"] / tokens)
    own_rng = random.Random(f"{setting} {number}")  # so that the other figures are drawn as without this one
    row["entropy_gap"] = own_rng.gauss(0, row["entropy_gap_error"])
    row["grad_norm"] *= 0.02 if all(tied) else rng.lognormvariate(0, 0.3) * noise
    row["kl"] = None if setting.beta == 0 else row["kl"] * rng.lognormvariate(0, min(0.9, 0.3 * noise))
    return row


def evaluation(rng: random.Random, step: int, ability: float, n: int, split: str = "validation", **more: Any) -> Row:
    """Simulate an evaluation: the problems are the same each time, and a few answers change by chance."""
    ranks = random.Random(f"{n} {split}")
    right = sum(ranks.random() < ability if rng.random() < 0.8 else rng.random() < ability for _ in range(n))
    low, high = wilson_interval(right, n)
    entry = {"step": step, "split": split, "accuracy": right / n, "n": n, "ci_low": low, "ci_high": high}
    return entry | {"well_formed": 1.0, "drift": 0.0 if step == 0 else 0.002 + 0.01 * rng.random()} | more


def run(
    setting: Setting,
    seed: int,
    curve: Curve,
    held_out: Curve | None = None,
    change: Callable[[Row, float], Any] | None = None,
) -> dict[str, Any]:
    """Simulate a whole run; `change` edits each step, given the share of the run that is over."""
    rng, held_out = random.Random(f"{setting} {seed}"), held_out or curve
    steps, evals = [], [evaluation(rng, 0, curve(0), setting.n, "test"), evaluation(rng, 0, held_out(0), setting.n)]
    for number in range(1, setting.steps + 1):
        done = number / setting.steps
        row = step_of(rng, setting, number, curve(done))
        if change is not None:
            row = change(row, done) or row
        steps.append(row)
        if number % EVAL_EVERY == 0 or number == setting.steps:
            evals.append(evaluation(rng, number, held_out(done), setting.n))
    evals.append(evaluation(rng, setting.steps, held_out(1), setting.n, "test"))
    config = {
        "batch_size": setting.batch,
        "num_generations": setting.group,
        "beta": setting.beta,
        "max_new_tokens": 22,
    }
    config |= {"learning_rate": 3e-6, "clip_grad_norm": 0.5, "num_inner_updates": 5, "num_iterations": setting.steps}
    record = {"config": config, "environment": {"device": "cpu"}, "outlook": outlook(setting, seed, curve(0))}
    return record | {"steps": steps, "evals": evals, "findings": []}


def outlook(setting: Setting, seed: int, ability: float) -> Row:
    """Simulate the outlook before the first step of a policy with this accuracy."""
    look = replace(setting, batch=min(8, setting.batch))
    row = step_of(random.Random(f"outlook {setting} {seed}"), look, 0, ability)
    shares = {"teaching": 1 - row["tied_groups_fraction"], "all_right": row["tied_all_right_fraction"]}
    shares |= {"pass_at_1": row["accuracy"], "pass_at_g": 1 - row["tied_all_wrong_fraction"]}
    shares |= {"well_formed": 1.0, "truncated": row["truncated_fraction"]}
    return {"groups": look.batch, "num_generations": look.group, **shares}


SHAPES = [(1, 2), (1, 8), (2, 2), (2, 4), (2, 16), (4, 4), (4, 8), (8, 2), (8, 8), (8, 16), (16, 4), (16, 16)]
HEALTHY: list[Curve] = [
    learning(0.33, 0.98),
    learning(0.3, 0.6, 2),
    learning(0.9, 0.97, 2),
    learning(0.25, 0.45, 1),
    learning(0.5, 0.68, 1),
    learning(0.4, 0.4),
]


def mixed_run(setting: Setting, seed: int, tasks: dict[str, tuple[float, Curve]]) -> dict[str, Any]:
    """Simulate a run on several tasks, each with its weight and its accuracy."""
    rng = random.Random(f"mixed {setting} {seed}")
    weights = [weight for weight, _ in tasks.values()]

    def change(row: Row, done: float) -> Row:
        drawn = rng.choices(list(tasks), weights, k=setting.batch)
        made = [group_of(rng, setting.group, tasks[name][1](done)) for name in drawn]
        return step_from(rng, setting, row["step"], *map(list, zip(*made, strict=True)))

    record = run(
        setting, seed, lambda done: sum(weight * curve(done) for weight, curve in tasks.values()), None, change
    )
    record["config"]["task"] = [f"{name}={weight}" for name, (weight, _) in tasks.items()]
    for entry in record["evals"]:
        done = entry["step"] / setting.steps
        by_task = {
            name: evaluation(
                rng, entry["step"], curve(done), max(5, round(setting.n * weight)), f"{name} {entry['split']}"
            )
            for name, (weight, curve) in tasks.items()
        }
        right, n = sum(e["accuracy"] * e["n"] for e in by_task.values()), sum(e["n"] for e in by_task.values())
        low, high = wilson_interval(round(right), n)
        entry |= {"accuracy": right / n, "n": n, "ci_low": low, "ci_high": high}
        figures = ("accuracy", "n", "ci_low", "ci_high")
        entry["categories"] = {name: {k: e[k] for k in figures} for name, e in by_task.items()}
    return record


MIXTURES: list[dict[str, tuple[float, Curve]]] = [
    {"sums": (0.7, learning(0.33, 0.98)), "words": (0.3, learning(0.25, 0.6, 2))},
    {"sums": (0.5, learning(0.4, 0.99, 8)), "words": (0.5, learning(0.2, 0.45, 1))},  # one is learned at once
    {"sums": (0.9, learning(0.3, 0.6, 2)), "words": (0.1, learning(0.4, 0.9, 2))},  # one is rare
    {"sums": (0.3, learning(0.6, 0.99)), "words": (0.3, learning(0.2, 0.7)), "towns": (0.4, learning(0.4, 0.4))},
]


def healthy_mixture(shape: tuple[int, int], seed: int) -> dict[str, Any]:
    """Simulate a run on several tasks in which nothing is wrong."""
    return mixed_run(setting_of(shape, seed), seed, MIXTURES[seed % len(MIXTURES)])


def setting_of(shape: tuple[int, int], seed: int) -> Setting:
    """Return a setting of this shape, with beta and the number of validation problems by chance."""
    rng = random.Random(f"{shape} {seed}")
    steps = max(120, min(300, 600 // shape[0]))
    return Setting(*shape, rng.choice([0.0, 0.04]), rng.choice([50, 100, 200, 500, 1000]), steps)


def healthy_run(shape: tuple[int, int], seed: int) -> dict[str, Any]:
    """Simulate a healthy run that starts at any accuracy and learns fast, slowly or not at all."""
    return run(setting_of(shape, seed), seed, HEALTHY[seed % len(HEALTHY)])
