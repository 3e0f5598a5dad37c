"""What changes from step to step: learning rate, group size, weight of the KL. Pure functions."""

from math import cos, isfinite, pi

MOST_ERROR, GAIN = 0.2, 0.1  # of the adaptive KL weight, as published
LARGEST_BETA = 1e3


def learning_rate_at(step: int, steps: int, peak: float, warmup: int, decay: str) -> float:
    """The learning rate of `step` (from 1) of `steps`: linear up to `peak` over `warmup` steps, then `decay`.

    `decay` is "none", "linear" or "cosine"; the last step is a step away from 0, not at it.
    """
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup - 1) / max(1, steps - warmup))
    if decay == "linear":
        return peak * (1 - done)
    return peak * (1 + cos(pi * done)) / 2 if decay == "cosine" else peak


def parse_group_schedule(text: str) -> tuple[int, int]:
    """First and last group size of "8:4"; raises ValueError for anything else."""
    first, _, last = text.partition(":")
    if not all(part.isascii() and part.isdigit() and 2 <= int(part[:6]) <= 10_000 for part in (first, last)):
        raise ValueError(f"group_schedule is {text!r}; write it as 8:4, from 8 completions a prompt to 4, at least 2")
    return int(first), int(last)


def group_size_at(step: int, steps: int, first: int, last: int) -> int:
    """The group size of `step` (from 1) of `steps`: linear from `first` in the first step to `last` in the last."""
    return round(first + (last - first) * min(1.0, (step - 1) / max(1, steps - 1)))


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """The weight of the KL after a step with this KL, nats a token: larger above the target, smaller below.

    beta · (1 + 0.1 · clip(kl / target − 1, ±0.2)): Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if not isfinite(kl):
        return beta
    error = max(-MOST_ERROR, min(MOST_ERROR, kl / target - 1))
    return min(LARGEST_BETA, beta * (1 + GAIN * error))
