"""The metrics of a step: one table with the name, title, unit, scale, meaning and formula of each.

The metrics file gets an entry of `steps` from it, plots take titles, units and scales, and the tests hold
`grpo/record/README.md` to it. A new metric is one more entry. It is torch-free, for the plots.
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
    from grpo.algorithm.update import UpdateStats

Value = float | int | None


@dataclass(frozen=True)
class StepResult:
    """What the metrics of a step are computed from."""

    step: int
    settings: "StepSettings"  # learning rate, group size and beta of this step
    drawn: "Rollout"  # all groups that were sampled, tied ones that were drawn again included
    rollout: "Rollout"  # the groups that were trained on
    updates: Sequence["UpdateStats"]
    sampler_gap: float
    weights_moved: float
    seconds: Mapping[str, float]  # by phase


@dataclass(frozen=True)
class StepMetric:
    """A metric of a step. A name that ends in `/*` stands for a family; its formula returns a mapping."""

    name: str
    meaning: str
    formula: Callable[[StepResult], Any]
    title: str = ""  # of its panel in a comparison of runs; "" draws none
    unit: str = ""
    scale: str = "number"  # of its axis: "share" from 0 to 1, "number" from 0, "reward" around 0 to 1


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


def _parts(result: StepResult) -> dict[str, list[Value]]:
    """Return the rewards by part, each (B,)."""
    rewards = result.drawn.rewards
    return {name: [reward.parts[name] for reward in rewards] for name in rewards[0].parts}


def _mean(values: Sequence[Value]) -> float | None:
    """Return the mean over the completions that a reward function applies to; None if there are none."""
    applied = [value for value in values if value is not None]
    return fmean(applied) if applied else None


def _finite(value: Any) -> float | None:
    """Return a number, or None if it is not finite: there is nothing that it is of."""
    return float(value) if isfinite(value) else None


def _group_std(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over groups of the std of the rewards that apply, in groups that have two; None if none has."""
    applied = [[r for r in group if isfinite(r)] for group in groups]
    return _mean([stdev(group) for group in applied if len(group) > 1])


def _spread(part: Sequence[Value], groups: int) -> float | None:
    """Return the mean of a part's std in the groups where it is not 0, as tied groups say nothing of its scale."""
    g = len(part) // groups
    applied = [[v for v in part[i : i + g] if v is not None] for i in range(0, len(part), g)]
    return _mean([stdev(group) for group in applied if len(group) > 1 and min(group) < max(group)])


TIED = "Tied groups, which teach nothing"
STEP_METRICS: tuple[StepMetric, ...] = (
    StepMetric("step", "number of the step, from 1", lambda s: s.step),
    StepMetric(
        "reward_mean",
        "mean reward of the completions that were drawn",
        lambda s: _finite(s.drawn.totals.nanmean()),
        *("Reward", "mean of the step", "reward"),
    ),
    StepMetric(
        "reward_std",
        "standard deviation of the rewards in a group, mean over the groups",
        lambda s: _group_std(s.drawn.totals.tolist()),
    ),
    StepMetric(
        "reward/*",
        "mean of each part, weighted, over the completions that it applies to, null if none; the parts add up to "
        "`reward_mean` if all apply",
        lambda s: {name: _mean(part) for name, part in _parts(s).items()},
    ),
    StepMetric(
        "reward_std/*",
        "standard deviation of each part in a group, mean over the groups where it is not 0, null if none",
        lambda s: {name: _spread(part, len(s.drawn.problems)) for name, part in _parts(s).items()},
    ),
    StepMetric(
        "accuracy",
        "share of the completions that were drawn that are right (training problems, at `temperature`)",
        lambda s: float(s.drawn.correct.float().mean()),
        *("Accuracy, sampled", "% of completions", "share"),
    ),
    StepMetric(
        "kl",
        "k3 against the reference, nats a token, mean over the tokens, first inner update; null without a reference",
        lambda s: s.updates[0].kl,
        *("KL to the reference", "nats a token"),
    ),
    StepMetric(
        "entropy",
        "entropy of the distribution that each token was drawn from, nats, mean over the tokens, first inner update",
        lambda s: s.updates[0].entropy,
        *("Entropy", "nats a token"),
    ),
    StepMetric(
        "completion_length",
        "mean tokens of a completion, the end token included",
        lambda s: float(s.drawn.lengths.float().mean()),
        *("Completion length", "tokens"),
    ),
    StepMetric(
        "truncated_fraction",
        "share of completions cut off by `max_new_tokens`",
        lambda s: float(s.drawn.truncated.cpu().float().mean()),
        *("Truncated", "% of completions", "share"),
    ),
    StepMetric(
        "empty_fraction",
        "share of completions of at most one token",
        lambda s: float((s.drawn.lengths <= 1).float().mean()),
    ),
    StepMetric(
        "repeated_endings_fraction",
        "share of completions in which a closing tag or an end marker appears more than once",
        lambda s: fmean(map(repeats_an_ending, s.drawn.completion_texts)),
    ),
    StepMetric(
        "tied_groups_fraction",
        "share of groups whose rewards are all equal: they teach nothing",
        lambda s: float(s.drawn.tied.float().mean()),
        *(TIED, "% of groups", "share"),
    ),
    StepMetric(
        "tied_all_right_fraction",
        "share of groups that are tied with every completion right",
        lambda s: float((s.drawn.tied & s.drawn.correct.all(1)).float().mean()),
    ),
    StepMetric(
        "tied_all_wrong_fraction",
        "share of groups that are tied with no completion right",
        lambda s: float((s.drawn.tied & ~s.drawn.correct.any(1)).float().mean()),
    ),
    StepMetric(
        "resampled_groups",
        "groups that were tied and drawn again (`--resample-tied`)",
        lambda s: len(s.drawn.problems) - len(s.rollout.problems),
    ),
    StepMetric(
        "kept_accuracy",
        "`accuracy` of the groups that were trained on, without those that were drawn again",
        lambda s: float(s.rollout.correct.float().mean()),
    ),
    StepMetric(
        "kept_tied_groups_fraction",
        "`tied_groups_fraction` of the groups that were trained on, without those that were drawn again",
        lambda s: float(s.rollout.tied.float().mean()),
    ),
    StepMetric(
        "loss",
        "negated objective, mean over the inner updates; near 0 is normal (advantages are centred, ratios near 1)",
        lambda s: fmean(u.loss for u in s.updates),
    ),
    StepMetric(
        "grad_norm",
        "norm of the gradient before clipping, mean over the inner updates",
        lambda s: fmean(u.grad_norm for u in s.updates),
        "Gradient norm",
    ),
    StepMetric(
        "clip_fraction",
        "share of tokens whose gradient the clipping removes, largest of the inner updates",
        lambda s: max(u.clip_fraction for u in s.updates),
        *("Clipped", "% of tokens", "share"),
    ),
    StepMetric(
        "ratio_min",
        "smallest ratio to the policy that sampled, over tokens and inner updates",
        lambda s: _finite(min(u.ratio_min for u in s.updates)),
    ),
    StepMetric(
        "ratio_max",
        "largest ratio to the policy that sampled, over tokens and inner updates",
        lambda s: _finite(max(u.ratio_max for u in s.updates)),
    ),
    StepMetric(
        "skipped_updates",
        "inner updates that were not applied because loss or gradient was not finite",
        lambda s: sum(not u.applied for u in s.updates),
    ),
    StepMetric(
        "sampler_gap",
        "largest difference between a completion token's log-probability when sampled and when scored, nats",
        lambda s: s.sampler_gap,
    ),
    StepMetric(
        "weights_moved",
        "share of some 10,000 fixed trainable weights whose value the step changed",
        lambda s: s.weights_moved,
    ),
    StepMetric("learning_rate", "learning rate of this step", lambda s: s.settings.learning_rate),
    StepMetric("beta", "weight of the KL in this step", lambda s: s.settings.beta),
    StepMetric("num_generations", "completions a prompt in this step", lambda s: s.settings.num_generations),
    StepMetric(
        "tokens",
        "prompt and completion tokens of the groups that were trained on",
        lambda s: int(s.rollout.lengths.sum()) + int(s.rollout.tokens.prompt_mask.sum()),
    ),
    StepMetric(
        "time/*",
        "seconds of `sample`, `reward`, `reference`, `update` and `total`; of each reward function in `reward` "
        "(`time/reward/exact`); and of checkpoints and saving after this step (`save`)",
        lambda s: s.seconds,
    ),
)
