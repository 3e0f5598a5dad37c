"""What changes from step to step: learning rate, group size, weight of the KL."""

from dataclasses import dataclass
from math import cos, isfinite, pi

from grpo.config import TrainConfig, parse_group_schedule

# The adaptive KL weight, as published: the relative error that counts at most, and how much of it changes the weight.
KL_MAX_ERROR = 0.2
KL_GAIN = 0.1
LARGEST_BETA = 1e3


@dataclass(frozen=True)
class StepSettings:
    """The settings of one step that may differ from those of another."""

    learning_rate: float
    num_generations: int  # completions a prompt, G
    beta: float  # weight of the KL


class Schedule:
    """The settings of each step. `beta` changes on the way if there is a target for the KL."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.beta = config.beta

    def at(self, step: int) -> StepSettings:
        """Return the settings of a step, from 1."""
        c = self.config
        group = c.num_generations
        if c.group_schedule:
            group = group_size_at(step, c.num_iterations, *parse_group_schedule(c.group_schedule))
        rate = learning_rate_at(step, c.num_iterations, c.learning_rate, c.warmup_steps, c.learning_rate_decay)
        return StepSettings(rate, group, self.beta)

    @property
    def largest_group(self) -> int:
        """Return the largest number of completions a prompt in any step."""
        return max(self.at(step).num_generations for step in (1, self.config.num_iterations))

    def adapt(self, kl: float | None) -> None:
        """Adapt beta after a step with this KL, nats a token, if there is a target for it."""
        if self.config.target_kl:
            self.beta = adapted_beta(self.beta, kl, self.config.target_kl)


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
    error = max(-KL_MAX_ERROR, min(KL_MAX_ERROR, kl / target - 1))
    return min(LARGEST_BETA, beta * (1 + KL_GAIN * error))
