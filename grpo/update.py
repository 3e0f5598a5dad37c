"""One inner update: the loss of a rollout, its gradient, and the step of the optimizer, if all is finite."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config import TrainConfig
from grpo.logprobs import Tokens, completion_logprobs
from grpo.loss import grpo_loss
from grpo.models import precision


@dataclass
class MicroBatch:
    """Whole groups that go through the model together."""

    tokens: Tokens
    advantages: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B, C), None without a reference
    old_logprobs: Tensor | None = None  # (B, C), filled by the first inner update


@dataclass(frozen=True)
class UpdateStats:
    """What one inner update looked like; means are over the completion tokens of the step."""

    loss: float
    grad_norm: float  # before clipping
    kl: float
    entropy: float | None  # in the first inner update only
    clip_fraction: float
    ratio_max: float
    applied: bool  # False where loss or gradient was not finite: the weights are untouched


def micro_batches(
    tokens: Tokens, advantages: Tensor, reference: PreTrainedModel | None, config: TrainConfig, shared: bool
) -> list[MicroBatch]:
    """Cut a rollout into whole groups, `micro_batch_size` prompts at a time, and score it with the reference."""
    prompts, g = tokens.prompt_ids.shape[0], tokens.num_generations
    size = config.micro_batch_size or prompts
    batches = []
    for start in range(0, prompts, size):
        part = tokens.prompts(start, min(start + size, prompts))
        ref_logprobs = None
        if reference is not None:
            with torch.no_grad(), precision(part.prompt_ids.device):
                ref_logprobs, _ = completion_logprobs(reference, part, config.temperature, shared=shared)
        batches.append(MicroBatch(part, advantages[start * g : (start + size) * g], ref_logprobs))
    return batches


def inner_update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    config: TrainConfig,
    shared: bool,
) -> UpdateStats:
    """Accumulate the gradient of the whole step over its micro-batches, clip it, and apply it.

    In the first inner update the policy is the one that sampled, so its log-probabilities become the old
    ones. Denominators are those of the step: 1 × B and B × 1 give the same gradient.
    """
    num_completions = sum(batch.advantages.shape[0] for batch in batches)
    num_tokens = sum(batch.tokens.completion_mask.sum() for batch in batches)
    sums = torch.zeros(4, device=num_tokens.device)  # loss; kl, entropy and clipped, summed over tokens
    ratio_max = torch.zeros((), device=num_tokens.device)
    first = batches[0].old_logprobs is None
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        mask = batch.tokens.completion_mask
        with precision(mask.device):
            logprobs, entropy = completion_logprobs(
                policy, batch.tokens, config.temperature, shared=shared, entropy=first
            )
        if first:
            batch.old_logprobs = logprobs.detach()
        result = grpo_loss(
            logprobs,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            mask,
            epsilon=config.epsilon,
            beta=config.beta,
            num_completions=num_completions,
        )
        result.loss.backward()
        of_tokens = (result.kl, entropy if first else torch.zeros_like(result.kl), result.clipped.float())
        sums += torch.stack([result.loss.detach(), *(torch.where(mask, x, 0.0).sum() for x in of_tokens)])
        ratio_max = torch.maximum(ratio_max, torch.where(mask, result.ratio, 0.0).max())
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip_grad_norm)
    loss, kl, entropy_sum, clipped = sums.tolist()
    applied = bool(torch.isfinite(grad_norm)) and bool(torch.isfinite(sums[0]))
    if applied:
        optimizer.step()
    n = max(1, int(num_tokens))
    return UpdateStats(
        loss=loss,
        grad_norm=float(grad_norm),
        kl=kl / n,
        entropy=entropy_sum / n if first else None,
        clip_fraction=clipped / n,
        ratio_max=float(ratio_max),
        applied=applied,
    )


def summary(updates: Sequence[UpdateStats]) -> dict[str, Any]:
    """The inner updates' part of a step's metrics; the README defines each name."""
    return {
        "kl": updates[0].kl,
        "loss": fmean(u.loss for u in updates),
        "clip_fraction": max(u.clip_fraction for u in updates),
        "ratio_max": max(u.ratio_max for u in updates),
        "entropy": updates[0].entropy,
        "grad_norm": fmean(u.grad_norm for u in updates),
        "skipped_updates": sum(not u.applied for u in updates),
    }
