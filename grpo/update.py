"""One inner update: the loss of a rollout, its gradient, and the step of the optimizer, if all is finite."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo import ranks
from grpo.config import TrainConfig
from grpo.logprobs import Tokens, completion_logprobs
from grpo.loss import grpo_loss
from grpo.memory import done_together, passes
from grpo.models import precision
from grpo.sharding import sum_gradients, whole


@dataclass(frozen=True)
class Batch:
    """What an inner update needs of a rollout, or of some of its rows."""

    tokens: Tokens
    advantages: Tensor  # (B,)
    num_completions: int  # of the whole step, on all devices
    num_tokens: int  # of those, as far as they count
    ref_logprobs: Tensor | None = None  # (B, C), None without a reference
    old_logprobs: Tensor | None = None  # (B, C), None in the first inner update, which finds them

    @classmethod
    def of_step(cls, tokens: Tokens, advantages: Tensor) -> "Batch":
        """All rows of a step."""
        return cls(tokens, advantages, advantages.shape[0], max(1, int(tokens.completion_mask.sum())))

    def part(self, rows: slice) -> "Batch":
        """Some rows, whole groups or a part of one, with as many columns as their tokens have."""
        tokens = self.tokens.part(rows)
        width = tokens.completion_ids.shape[1]
        ref, old = (x if x is None else x[rows, :width] for x in (self.ref_logprobs, self.old_logprobs))
        return replace(self, tokens=tokens, advantages=self.advantages[rows], ref_logprobs=ref, old_logprobs=old)


@dataclass(frozen=True)
class UpdateStats:
    """What one inner update looked like; means are over the completion tokens of the step."""

    loss: float
    grad_norm: float  # before clipping
    kl: float
    entropy: float | None  # in the first inner update only
    clip_fraction: float
    ratio_min: float
    ratio_max: float
    applied: bool  # False where loss or gradient was not finite: the weights are untouched


@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, tokens: Tokens, config: TrainConfig, *, shared: bool, limit: int
) -> Tensor:
    """The reference's log-probabilities of a rollout, (B, C), at most `limit` rows a pass."""
    logprobs = torch.zeros(tokens.completion_ids.shape, device=tokens.completion_ids.device)
    for rows in passes(logprobs.shape[0], tokens.num_generations, limit):
        with precision(logprobs.device):
            part, _ = completion_logprobs(reference, tokens.part(rows), config.temperature, shared=shared)
        logprobs[rows, : part.shape[1]] = part
    return logprobs


@dataclass
class Totals:
    """What the passes of an inner update add up to."""

    sums: Tensor  # (4,): loss; kl, entropy and clipped, summed over tokens
    ratio_min: Tensor
    ratio_max: Tensor
    logprobs: Tensor  # (B, C) of the policy before the update


def inner_update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    *,
    shared: bool,
    limit: int,
) -> tuple[UpdateStats, Tensor]:
    """Accumulate the gradient of the whole step over micro-batches of at most `limit` rows, clip it, apply it.

    Also returns the policy's log-probabilities before the update, (B, C): in the first inner update the policy is the
    one that sampled, so they are the old ones of the others. Denominators are those of the step: 1 × B and B × 1
    give the same gradient, and so do any number of processes.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = _accumulate(policy, batch, config, shared, limit)
    with done_together("the optimizer's step"):
        sum_gradients(policy.parameters())
        found = ranks.total(totals.sums), ranks.smallest(totals.ratio_min), ranks.largest(totals.ratio_max)
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip_grad_norm))
        # one look at the device for all of them
        loss, kl, entropy, clipped, low, high, grad_norm = torch.cat([x.reshape(-1) for x in (*found, norm)]).tolist()
        applied = isfinite(loss) and isfinite(grad_norm)
        if applied:
            optimizer.step()
    n, first = batch.num_tokens, batch.old_logprobs is None
    entropy_mean = entropy / n if first else None
    return UpdateStats(loss, grad_norm, kl / n, entropy_mean, clipped / n, low, high, applied), totals.logprobs


def _accumulate(policy: PreTrainedModel, batch: Batch, config: TrainConfig, shared: bool, limit: int) -> Totals:
    """Forward and backward pass of each micro-batch; the gradients stay in the policy."""
    device, first = batch.advantages.device, batch.old_logprobs is None
    totals = Totals(
        torch.zeros(4, device=device),
        torch.full((), torch.inf, device=device),
        torch.zeros((), device=device),
        torch.zeros(batch.tokens.completion_ids.shape, device=device),
    )
    for rows in passes(batch.advantages.shape[0], batch.tokens.num_generations, limit):
        micro = batch.part(rows)
        mask = micro.tokens.completion_mask
        with precision(device):
            logprobs, entropy = completion_logprobs(
                policy, micro.tokens, config.temperature, shared=shared, entropy=first
            )
        totals.logprobs[rows, : mask.shape[1]] = logprobs.detach()
        result = grpo_loss(
            logprobs,
            logprobs.detach() if first else micro.old_logprobs,
            micro.ref_logprobs,
            micro.advantages,
            mask,
            config,
            num_completions=batch.num_completions,
            num_tokens=batch.num_tokens,
        )
        result.loss.backward()
        of_tokens = (result.kl, entropy if first else torch.zeros_like(result.kl), result.clipped.float())
        totals.sums += torch.stack([result.loss.detach(), *(torch.where(mask, x, 0.0).sum() for x in of_tokens)])
        totals.ratio_min = torch.minimum(totals.ratio_min, torch.where(mask, result.ratio, torch.inf).min())
        totals.ratio_max = torch.maximum(totals.ratio_max, torch.where(mask, result.ratio, 0.0).max())
    return totals


def summary(updates: Sequence[UpdateStats]) -> dict[str, Any]:
    """The inner updates' part of a step's metrics; the README defines each name."""
    return {
        "kl": updates[0].kl,
        "loss": fmean(u.loss for u in updates),
        "clip_fraction": max(u.clip_fraction for u in updates),
        "ratio_min": min(u.ratio_min for u in updates),
        "ratio_max": max(u.ratio_max for u in updates),
        "entropy": updates[0].entropy,
        "grad_norm": fmean(u.grad_norm for u in updates),
        "skipped_updates": sum(not u.applied for u in updates),
    }
