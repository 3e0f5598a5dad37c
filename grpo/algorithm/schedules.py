"""What changes from step to step: learning rate, group size, weight of the KL. Pure functions."""

from dataclasses import replace
from math import cos, isfinite, pi

from grpo.config import TrainConfig, parse_group_schedule

MOST_ERROR, GAIN = 0.2, 0.1  # of the adaptive KL weight, as published
LARGEST_BETA = 1e3


def scheduled(config: TrainConfig, step: int, beta: float) -> TrainConfig:
    """Return the settings of one step (from 1), with scheduled values and the adapted `beta`."""
    c = config
    rate = learning_rate_at(step, c.num_iterations, c.learning_rate, c.warmup_steps, c.learning_rate_decay)
    group = c.num_generations
    if c.group_schedule:
        group = group_size_at(step, c.num_iterations, *parse_group_schedule(c.group_schedule))
    return replace(c, learning_rate=rate, num_generations=group, beta=beta)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int, decay: str) -> float:
    """Return the learning rate of `step` (from 1) of `steps`: linear up to `peak` over `warmup` steps, then `decay`.

    `decay` is "none", "linear" or "cosine"; the last step is one step away from 0, not at it.
    """
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup - 1) / max(1, steps - warmup))
    if decay == "linear":
        return peak * (1 - done)
    return peak * (1 + cos(pi * done)) / 2 if decay == "cosine" else peak


def group_size_at(step: int, steps: int, first: int, last: int) -> int:
    """Return the group size of `step` (from 1): linear from `first` in step 1 to `last` in step `steps`."""
    return round(first + (last - first) * min(1.0, (step - 1) / max(1, steps - 1)))


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """Return the weight of the KL after a step with this KL, nats a token: larger above the target, smaller below.

    beta · (1 + 0.1 · clip(kl / target − 1, ±0.2)): Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if not isfinite(kl):
        return beta
    error = max(-MOST_ERROR, min(MOST_ERROR, kl / target - 1))
    return min(LARGEST_BETA, beta * (1 + GAIN * error))
