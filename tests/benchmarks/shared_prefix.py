"""Measure how much faster updates are with the shared prefix: `python -m tests.benchmarks.shared_prefix`.

Both ways run alternately in one process, on the starter model: on a rollout of the default run, whose prompts and
completions differ in length, and on random tokens of full length. The result is the ratio of medians, with the
quartiles of the ratios of neighbouring runs. The bound counts tokens: G(P + C) / (P + G·C).
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click
import torch

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.scoring.tokens import Tokens
from tasks.registry import make_task
from tests.helpers.rollouts import a_batch
from tests.helpers.scoring import scorer_for


def random_tokens(prompts: int, group: int, prompt_length: int, completion_length: int) -> Tokens:
    """Return random tokens of full length, for which the bound is exact."""
    generator = torch.Generator().manual_seed(0)
    shape = (prompts * group, completion_length)
    return Tokens(
        torch.randint(0, 250, (prompts, prompt_length), generator=generator),
        torch.ones(prompts, prompt_length, dtype=torch.bool),
        torch.randint(0, 250, shape, generator=generator),
        torch.ones(shape, dtype=torch.bool),
    )


def measure(tokens: Tokens, config: TrainConfig, runs: int) -> dict[bool, list[float]]:
    """Seconds of a step's updates with shared prompts and without, `runs` of each, alternating after a warm-up."""
    model = load("starter", torch.device("cpu")).model
    rows = tokens.completion_ids.shape[0]
    slow = replace(config, learning_rate=1e-6)
    microbatch = AdaptiveMicrobatch("the update", rows, tokens.num_generations)
    updaters = {shared: Updater(model, slow, scorer_for(model, shared), microbatch) for shared in (True, False)}
    advantages = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    seconds: dict[bool, list[float]] = {shared: [] for shared in updaters}
    for run in range(2 + runs):
        for shared, updater in updaters.items():
            batch = a_batch(tokens, advantages, config.max_new_tokens)
            start = time.perf_counter()
            for _ in range(config.num_inner_updates):
                update = updater.inner_update(batch, config.beta, rows)
                batch = batch if batch.old_logprobs is not None else replace(batch, old_logprobs=update.logprobs)
            if run >= 2:
                seconds[shared].append(time.perf_counter() - start)
    return seconds


def compare(runs: int) -> Iterator[dict[str, Any]]:
    """Yield the median seconds of a step's updates, both ways: for a rollout, and for P = 150, C = 64, G = 16."""
    config = resolve({"model": "starter", "beta": 0.0})
    task = make_task(config)
    trained = replace(config, learning_rate=1e-5)
    grpo = GRPO(trained, task, load("starter", torch.device("cpu")))
    for step in range(1, 11):  # past the first steps, completions have the length that they keep
        rollout = grpo.step(step).rollout
    batches = {"default run": rollout.tokens}
    batches |= {f"random {n}": random_tokens(n, 16, 150, 64) for n in (2, 4)}
    for name, tokens in batches.items():
        seconds = measure(tokens, config, runs)
        (prompts, p), c, g = tokens.prompt_ids.shape, tokens.completion_ids.shape[1], tokens.num_generations
        low, _, high = statistics.quantiles([b / a for a, b in zip(*seconds.values(), strict=True)], n=4)
        yield {
            "name": f"{name}: N={prompts} G={g} P={p} C={c}",
            "shared": statistics.median(seconds[True]),
            "dense": statistics.median(seconds[False]),
            "quartiles": (low, high),
            "bound": g * (p + c) / (p + g * c),
        }


@click.command()
@click.option("--runs", default=20, show_default=True, help="updates of each kind")
def main(runs: int) -> None:
    """Print a line for a rollout of the default run and for each batch with P = 150, C = 64, G = 16."""
    click.echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, {runs} updates of each kind")
    for row in compare(runs):
        times, (low, high) = row["dense"] / row["shared"], row["quartiles"]
        click.echo(
            f"{row['name']}: dense {1000 * row['dense']:.1f} ms, shared {1000 * row['shared']:.1f} ms, "
            f"{times:.2f} times faster (quartiles {low:.2f} to {high:.2f}), token bound {row['bound']:.2f}, "
            f"share of the bound {times / row['bound']:.2f}"
        )


if __name__ == "__main__":
    main()
