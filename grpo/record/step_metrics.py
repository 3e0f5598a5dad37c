"""Define the metrics of a step in one table. The metrics file, the plots and README.md use this table.

This module does not import torch, so that plots start quickly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from tasks.rewards.functions import repeats_an_ending

if TYPE_CHECKING:
    from grpo.algorithm.rollout import Rollout
    from grpo.algorithm.schedules import StepSettings

Value = float | int | None


@dataclass(frozen=True)
class UpdateStats:
    """Measurements of one inner update. KL, entropy and clip fraction are means over the step's completion tokens."""

    loss: float
    grad_norm: float  # before clipping
    applied: bool  # False if the weights are unchanged, because loss or gradient was not finite
    kl: float | None  # None if there is no reference
    entropy: float | None  # measured in the first inner update only, else None
    clip_fraction: float
    ratio_min: float  # inf if all completions are masked
    ratio_max: float  # -inf if all completions are masked


@dataclass(frozen=True)
class StepResult:
    """The result of a step, from which its metrics are computed."""

    step: int
    settings: "StepSettings"  # the learning rate, group size and beta of this step
    drawn: "Rollout"  # all groups that were drawn, including tied groups that were then replaced
    rollout: "Rollout"  # the groups that were trained on
    updates: Sequence[UpdateStats]
    sampler_gap: float
    entropy_gap: tuple[float, float] | None  # the gap and its standard error; None if it cannot be measured
    weights_moved: float
    seconds: Mapping[str, float]  # the time of each phase


@dataclass(frozen=True)
class StepMetric:
    """A metric of a step. If its name ends in `/*`, the formula returns a dict, whose keys replace the `*`."""

    name: str
    meaning: str
    formula: Callable[[StepResult], Any]
    title: str = ""  # the title of its panel; a metric without a title is not drawn
    unit: str = ""
    scale: str = "number"  # the range of the axis: "share" 0 to 1, "number" from 0, "reward" 0 to 1 or wider


def metric_title(name: str) -> str:
    """Return the title of a metric's panel, with its unit."""
    metric = next(metric for metric in STEP_METRICS if metric.name == name)
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def step_metrics(result: StepResult) -> dict[str, Value]:
    """Return the entry of a step in `steps` of the metrics file."""
    entry: dict[str, Value] = {}
    for metric in STEP_METRICS:
        value = metric.formula(result)
        if metric.name.endswith("/*"):
            entry |= {metric.name.removesuffix("*") + name: v for name, v in value.items()}
        else:
            entry[metric.name] = value
    return entry


def _by_part(rollout: "Rollout", figure: Callable[[Sequence[Value]], Value]) -> dict[str, Value]:
    """Return `figure(values)` by name of the reward part. `values`, (B,), has None where the part does not apply."""
    rewards = rollout.rewards
    return {name: figure([reward.parts[name] for reward in rewards]) for name in rewards[0].parts}


def _mean(values: Sequence[Value]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    applied = [value for value in values if value is not None]
    return fmean(applied) if applied else None


def _finite(value: Any) -> float | None:
    """Return a number as a float; None if it is not finite, such as the mean of no values."""
    return float(value) if isfinite(value) else None


def _group_std(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the mean std within a group, over the groups with two or more finite rewards; None if there are none."""
    applied = [[r for r in group if isfinite(r)] for group in groups]
    return _mean([stdev(group) for group in applied if len(group) > 1])


def _spread(part: Sequence[Value], groups: int) -> float | None:
    """Return a part's std within a group, mean over the groups where it is not 0; None if it is 0 in every group."""
    g = len(part) // groups
    applied = [[v for v in part[i : i + g] if v is not None] for i in range(0, len(part), g)]
    return _mean([stdev(group) for group in applied if len(group) > 1 and min(group) < max(group)])


STEP_METRICS: tuple[StepMetric, ...] = (
    StepMetric(name="step", meaning="number of the step, counted from 1", formula=lambda s: s.step),
    StepMetric(
        name="reward_mean",
        meaning="mean reward of the completions",
        formula=lambda s: _finite(s.drawn.totals.nanmean()),
        title="Reward",
        unit="mean of the step",
        scale="reward",
    ),
    StepMetric(
        name="reward_std",
        meaning="standard deviation of the rewards in a group, mean over the groups",
        formula=lambda s: _group_std(s.drawn.totals.tolist()),
    ),
    StepMetric(
        name="reward/*",
        meaning="mean of each weighted part over the completions to which it applies, null if there are none; parts "
        "that apply to all completions add up to `reward_mean`",
        formula=lambda s: _by_part(s.drawn, _mean),
    ),
    StepMetric(
        name="reward_errors",
        meaning="failures of your reward functions, over all completions; a completion with a failure has no reward",
        formula=lambda s: sum(len(reward.errors) for reward in s.drawn.rewards),
    ),
    StepMetric(
        name="reward_std/*",
        meaning="standard deviation of each part in a group, mean over the groups where it is not 0, null if there "
        "are none",
        formula=lambda s: _by_part(s.drawn, lambda part: _spread(part, len(s.drawn.problems))),
    ),
    StepMetric(
        name="accuracy",
        meaning="share of completions that are right (training problems, sampled at `temperature`)",
        formula=lambda s: float(s.drawn.correct.float().mean()),
        title="Accuracy, sampled",
        unit="% of completions",
        scale="share",
    ),
    StepMetric(
        name="kl",
        meaning="KL to the reference (k3), mean over the tokens, in the first inner update; null without a reference",
        formula=lambda s: s.updates[0].kl,
        title="KL to the reference",
        unit="nats a token",
    ),
    StepMetric(
        name="entropy",
        meaning="entropy of the distribution from which a token was drawn, mean over the tokens, in the first inner "
        "update",
        formula=lambda s: s.updates[0].entropy,
        title="Entropy",
        unit="nats a token",
    ),
    StepMetric(
        name="completion_length",
        meaning="mean number of tokens in a completion, with its end token if it has one",
        formula=lambda s: float(s.drawn.lengths.float().mean()),
        title="Completion length",
        unit="tokens",
    ),
    StepMetric(
        name="truncated_fraction",
        meaning="share of completions cut off by `max_new_tokens`",
        formula=lambda s: float(s.drawn.truncated.float().mean()),
        title="Truncated",
        unit="% of completions",
        scale="share",
    ),
    StepMetric(
        name="empty_fraction",
        meaning="share of completions with at most one token",
        formula=lambda s: float((s.drawn.lengths <= 1).float().mean()),
    ),
    StepMetric(
        name="repeated_endings_fraction",
        meaning="share of completions in which a closing tag or an end marker appears more than once",
        formula=lambda s: fmean(map(repeats_an_ending, s.drawn.completion_texts)),
    ),
    StepMetric(
        name="tied_groups_fraction",
        meaning="share of groups whose rewards are all equal, so that they have no learning signal",
        formula=lambda s: float(s.drawn.tied.float().mean()),
        title="Tied groups, no learning signal",
        unit="% of groups",
        scale="share",
    ),
    StepMetric(
        name="tied_all_right_fraction",
        meaning="share of groups that are tied and have only right completions",
        formula=lambda s: float((s.drawn.tied & s.drawn.correct.all(1)).float().mean()),
    ),
    StepMetric(
        name="tied_all_wrong_fraction",
        meaning="share of groups that are tied and have only wrong completions",
        formula=lambda s: float((s.drawn.tied & ~s.drawn.correct.any(1)).float().mean()),
    ),
    StepMetric(
        name="resampled_groups",
        meaning="number of tied groups that were drawn again (`--resample-tied`) and not trained on",
        formula=lambda s: len(s.drawn.problems) - len(s.rollout.problems),
    ),
    StepMetric(
        name="kept_accuracy",
        meaning="`accuracy` of the groups that were trained on",
        formula=lambda s: float(s.rollout.correct.float().mean()),
    ),
    StepMetric(
        name="kept_tied_groups_fraction",
        meaning="`tied_groups_fraction` of the groups that were trained on",
        formula=lambda s: float(s.rollout.tied.float().mean()),
    ),
    StepMetric(
        name="loss",
        meaning="negated objective, mean over the inner updates; near 0 is normal, as advantages have mean 0",
        formula=lambda s: fmean(u.loss for u in s.updates),
    ),
    StepMetric(
        name="grad_norm",
        meaning="norm of the gradient before clipping, mean over the inner updates",
        formula=lambda s: fmean(u.grad_norm for u in s.updates),
        title="Gradient norm",
    ),
    StepMetric(
        name="clip_fraction",
        meaning="share of clipped tokens, in the inner update that clips most; their surrogate has no gradient "
        "(CISPO: a capped one)",
        formula=lambda s: max(u.clip_fraction for u in s.updates),
        title="Clipped",
        unit="% of tokens",
        scale="share",
    ),
    StepMetric(
        name="ratio_min",
        meaning="smallest ratio to the policy that sampled, over tokens and inner updates",
        formula=lambda s: _finite(min(u.ratio_min for u in s.updates)),
    ),
    StepMetric(
        name="ratio_max",
        meaning="largest ratio to the policy that sampled, over tokens and inner updates",
        formula=lambda s: _finite(max(u.ratio_max for u in s.updates)),
    ),
    StepMetric(
        name="skipped_updates",
        meaning="number of inner updates that were not applied because loss or gradient was not finite",
        formula=lambda s: sum(not u.applied for u in s.updates),
    ),
    StepMetric(
        name="sampler_gap",
        meaning="largest difference between a completion token's log-probability when sampled and when scored, nats",
        formula=lambda s: s.sampler_gap,
    ),
    StepMetric(
        name="entropy_gap",
        meaning="mean of -log p of the sampled tokens minus `entropy`, nats; 0 within its error if the tokens are "
        "drawn from the distribution that is scored; null if tied groups are redrawn or completions do not count",
        formula=lambda s: s.entropy_gap and s.entropy_gap[0],
    ),
    StepMetric(
        name="entropy_gap_error",
        meaning="standard error of `entropy_gap`",
        formula=lambda s: s.entropy_gap and s.entropy_gap[1],
    ),
    StepMetric(
        name="weights_moved",
        meaning="share of weights that the step changed, in a fixed sample of about 10,000 trainable weights",
        formula=lambda s: s.weights_moved,
    ),
    StepMetric(
        name="learning_rate", meaning="learning rate of this step", formula=lambda s: s.settings.learning_rate
    ),
    StepMetric(name="beta", meaning="weight of the KL in this step", formula=lambda s: s.settings.beta),
    StepMetric(
        name="num_generations",
        meaning="completions of each prompt in this step",
        formula=lambda s: s.settings.num_generations,
    ),
    StepMetric(
        name="tokens",
        meaning="prompt and completion tokens of the groups that were trained on",
        formula=lambda s: int(s.rollout.lengths.sum()) + int(s.rollout.tokens.prompt_mask.sum()),
    ),
    StepMetric(
        name="time/*",
        meaning="seconds of `sample`, `reward`, `reference`, `update` and `total`, of each reward function "
        "(`time/reward/exact`), and of writing checkpoints and models after this step (`save`)",
        formula=lambda s: s.seconds,
    ),
)
