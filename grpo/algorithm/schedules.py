"""The settings that may change from step to step: learning rate, group size, weight of the KL."""

from dataclasses import dataclass
from math import cos, isfinite, pi

from grpo.config import TrainConfig, parse_group_schedule

KL_MAX_ERROR = 0.2  # The relative error of the KL is clipped to ±0.2, as in the paper (see `adapted_beta`).
KL_GAIN = 0.1  # The weight of the KL changes by 0.1 times the clipped error, as in the paper.
MAX_BETA = 1e3  # Beta, the weight of the KL, never rises above this, even if the KL stays above its target.


@dataclass(frozen=True)
class StepSettings:
    """One step's values of the settings that may change from step to step."""

    learning_rate: float
    num_generations: int  # completions per prompt, G
    beta: float  # weight of the KL


class Schedule:
    """The settings of each step. With `--target-kl`, `beta` is adapted after each step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.beta = config.beta

    def at(self, step: int) -> StepSettings:
        """Return the settings of step number `step`, counted from 1."""
        c = self.config
        group = c.num_generations
        if c.group_schedule:
            group = group_size_at(step, c.num_iterations, *parse_group_schedule(c.group_schedule))
        rate = learning_rate_at(step, c.num_iterations, c.learning_rate, c.warmup_steps, c.learning_rate_decay)
        return StepSettings(rate, group, self.beta)

    def adapt(self, kl: float) -> None:
        """Adapt beta to the KL of a step, in nats per token."""
        self.beta = adapted_beta(self.beta, kl, self.config.target_kl)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int, decay: str) -> float:
    """Return the learning rate of step number `step`, counted from 1. It rises linearly to `peak` in `warmup` steps.

    `decay` is "none", "linear" or "cosine"; a decay would reach 0 one step after the last of `steps` steps.
    """
    if step <= warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup - 1) / max(1, steps - warmup))
    if decay == "linear":
        return peak * (1 - done)
    return peak * (1 + cos(pi * done)) / 2 if decay == "cosine" else peak


def group_size_at(step: int, steps: int, first: int, last: int) -> int:
    """Return the group size of `step`: it changes linearly from `first` in step 1 to `last` in step `steps`."""
    return round(first + (last - first) * min(1.0, (step - 1) / max(1, steps - 1)))


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """Return the next weight of the KL: larger if `kl`, in nats per token, was above the target, smaller if below.

    It is beta · (1 + 0.1 · clip(kl / target − 1, ±0.2)): Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    if not isfinite(kl):
        return beta
    error = max(-KL_MAX_ERROR, min(KL_MAX_ERROR, kl / target - 1))
    return min(MAX_BETA, beta * (1 + KL_GAIN * error))
