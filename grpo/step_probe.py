"""Take a step, and compute its metrics from its outcome and from the weights before and after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.grpo import GRPO, StepOutcome
from grpo.algorithm.loss import grpo_loss
from grpo.algorithm.update import Batch, Update
from grpo.config import TrainConfig
from grpo.model.lora import trainable
from grpo.record.step_metrics import StepResult, UpdateStats, step_metrics
from grpo.runtime.ranks import Ranks, sample_of
from grpo.runtime.sharding import local_tensor

WATCHED_WEIGHTS = 10_000  # A sample of this size shows whether updates change the weights, and is cheap to copy.


def measured_step(grpo: GRPO, step: int) -> tuple[StepOutcome, dict[str, Any]]:
    """Take step number `step` of GRPO; return its outcome and its metrics."""
    weights = watched_weights(grpo.policy)
    grpo.clock.seconds = {}
    with grpo.clock("total"):
        outcome = grpo.step(step)
    result = StepResult(
        step=step,
        settings=outcome.settings,
        drawn=outcome.drawn,
        rollout=outcome.rollout,
        updates=update_stats(outcome.updates, outcome.batch, grpo.config, grpo.ranks),
        sampler_gap=sampler_gap(outcome, grpo.ranks),
        entropy_gap=entropy_gap(outcome, grpo.config, grpo.ranks),
        weights_moved=moved_fraction(weights, watched_weights(grpo.policy), grpo.ranks),
        seconds=grpo.clock.seconds,
    )
    return outcome, step_metrics(result)


@torch.no_grad()
def update_stats(updates: Sequence[Update], batch: Batch, config: TrainConfig, ranks: Ranks) -> list[UpdateStats]:
    """Return the statistics of each inner update of a step; `batch` is the batch after the last update."""
    mask = batch.tokens.completion_mask
    sums, lowest, highest = [], [], []
    for update in updates:
        logprobs = update.logprobs, batch.old_logprobs, batch.ref_logprobs
        tokens = grpo_loss(*logprobs, batch.advantages, mask, config, config.beta)
        entropies = torch.zeros_like(tokens.kl) if update.entropies is None else update.entropies
        by_token = (tokens.kl, entropies, tokens.clipped.float())
        sums.append(torch.stack([torch.where(mask, x, 0.0).sum() for x in by_token]))
        lowest.append(torch.where(mask, tokens.ratio, torch.inf).min())
        highest.append(torch.where(mask, tokens.ratio, -torch.inf).max())
    ratios = ranks.all_reduce(torch.stack(lowest), "min"), ranks.all_reduce(torch.stack(highest), "max")
    figures = torch.cat([ranks.all_reduce(torch.stack(sums)), torch.stack(ratios, 1)], 1)  # (updates, 5)
    n = batch.sizes.num_tokens
    return [
        UpdateStats(
            loss=update.loss,
            grad_norm=update.grad_norm,
            applied=update.applied,
            kl=None if batch.ref_logprobs is None else kl / n,
            entropy=None if update.entropies is None else entropy / n,
            clip_fraction=clipped / n,
            ratio_min=ratio_min,
            ratio_max=ratio_max,
        )
        for update, (kl, entropy, clipped, ratio_min, ratio_max) in zip(updates, figures.tolist(), strict=True)
    ]


def sampler_gap(outcome: StepOutcome, ranks: Ranks) -> float:
    """Return the largest difference, in nats, between a token's log-probabilities when sampled and when scored."""
    mask = outcome.batch.tokens.completion_mask
    scored = outcome.batch.old_logprobs
    own_rows = ranks.own_slice(len(outcome.rollout.sample_logprobs))
    sampled = outcome.rollout.sample_logprobs[own_rows, : scored.shape[1]].to(scored.device)
    return float(ranks.all_reduce(torch.where(mask, (sampled - scored).abs(), 0.0).amax(), "max"))


def entropy_gap(outcome: StepOutcome, config: TrainConfig, ranks: Ranks) -> tuple[float, float] | None:
    """Return the mean of −log p of the sampled tokens minus their mean entropy, and its standard error, in nats.

    Both figures are those of the first inner update, so p and entropy are of one distribution: the policy that
    sampled, at the sampling temperature. Given the tokens before it, a token that was drawn from this distribution
    has an expected difference of 0. So the differences are uncorrelated, and the variance of their sum is the sum of
    their squares. None if completions were left out because of what was sampled, as the others are no fair sample.
    """
    chosen = config.resample_tied or config.mask_truncated_completions or not outcome.rollout.applies.all()
    entropies = outcome.updates[0].entropies
    if chosen or entropies is None:
        return None
    difference = torch.where(outcome.batch.tokens.completion_mask, -outcome.batch.old_logprobs - entropies, 0.0)
    sums = ranks.all_reduce(torch.stack([difference.sum(), difference.square().sum()]))
    total, squares = sums.tolist()
    n = outcome.batch.sizes.num_tokens
    return total / n, squares**0.5 / n


def watched_weights(policy: PreTrainedModel) -> Tensor:
    """Return a copy of about WATCHED_WEIGHTS trainable weights, always the same ones."""
    parameters = [local_tensor(parameter.detach()) for parameter in trainable(policy).values()]
    return torch.cat(sample_of(parameters, WATCHED_WEIGHTS))


def moved_fraction(before: Tensor, after: Tensor, ranks: Ranks) -> float:
    """Return the share of the watched weights, on all ranks, that changed."""
    moved = (before != after).float()
    changed, watched = ranks.all_reduce(torch.stack([moved.sum(), torch.ones_like(moved).sum()])).tolist()
    return changed / max(1.0, watched)
