"""One inner update: the loss of a rollout, its gradient, and the optimizer's step, if all of it is finite."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.loss import AVERAGES, StepSizes, grpo_loss
from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig
from grpo.model.lora import trainable
from grpo.runtime import distributed
from grpo.runtime.console import suppress_warnings
from grpo.runtime.distributed import distribute_like, full_tensor, gather_to_rank0, local_tensor, sum_gradients
from grpo.runtime.microbatch import AdaptiveMicrobatch, oom_is_fatal, split_microbatches
from grpo.runtime.precision import in_precision
from grpo.scoring.logprobs import completion_logprobs
from grpo.scoring.tokens import Tokens

WATCHED = 10_000  # weights that `watched_weights` copies


@dataclass(frozen=True)
class Batch:
    """What an inner update needs of a rollout, or of some of its rows."""

    tokens: Tokens
    advantages: Tensor  # (B,)
    sizes: StepSizes
    ref_logprobs: Tensor | None = None  # (B, C), None without a reference
    old_logprobs: Tensor | None = None  # (B, C), None until the first inner update has computed them

    @classmethod
    def of_step(
        cls, tokens: Tokens, advantages: Tensor, max_new_tokens: int, num_completions: int | None = None
    ) -> "Batch":
        """Make a batch of all rows of a step; `num_completions` of them have a part in it, by default all."""
        num_tokens = max(1, int(tokens.completion_mask.sum()))
        n = advantages.shape[0] if num_completions is None else max(1, num_completions)
        return cls(tokens, advantages, StepSizes(n, num_tokens, max_new_tokens))

    @classmethod
    def from_rollout(cls, rollout: Rollout, config: TrainConfig) -> "Batch":
        """Make a batch of this rank's rows of a rollout, with the sizes of the whole step."""
        tokens, applying = rollout.loss_tokens(config), int(rollout.applies.sum())
        batch = cls.of_step(tokens, rollout.advantages, config.max_new_tokens, applying)
        return batch.slice_rows(distributed.local_slice(len(rollout.advantages)))

    def slice_rows(self, rows: slice) -> "Batch":
        """Return some rows, whole groups or a part of one, with as many columns as their tokens have."""
        tokens = self.tokens.slice_rows(rows)
        width = tokens.completion_ids.shape[1]
        ref, old = (x if x is None else x[rows, :width] for x in (self.ref_logprobs, self.old_logprobs))
        return replace(self, tokens=tokens, advantages=self.advantages[rows], ref_logprobs=ref, old_logprobs=old)


@dataclass(frozen=True)
class UpdateStats:
    """Figures of one inner update; means are over the completion tokens of the step."""

    loss: float
    grad_norm: float  # before clipping
    kl: float | None  # None without a reference
    entropy: float | None  # in the first inner update only
    clip_fraction: float
    ratio_min: float  # not finite where all completions are masked
    ratio_max: float
    applied: bool  # False if loss or gradient was not finite: the weights are unchanged


class Updater:
    """The policy's optimizer: `stats, batch = updater(batch, config)` is one inner update."""

    def __init__(
        self, policy: PreTrainedModel, config: TrainConfig, packed: bool, microbatch: AdaptiveMicrobatch
    ) -> None:
        """`packed`: score packed rows."""
        self.policy, self.packed, self.microbatch = policy, packed, microbatch
        self.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.skipped_in_a_row = 0  # updates that were not finite

    def __call__(self, batch: Batch, config: TrainConfig) -> tuple[UpdateStats, Batch]:
        """Update the policy; return the figures, and the batch with `old_logprobs`, computed by the first update."""
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate
        with self.recompute_activations():
            stats, logprobs = self.microbatch.run(
                inner_update, self.policy, self.optimizer, batch, config, self.packed
            )
        self.skipped_in_a_row = 0 if stats.applied else self.skipped_in_a_row + 1
        if batch.old_logprobs is None:  # the policy was still the one that sampled
            batch = replace(batch, old_logprobs=logprobs)
        return stats, batch

    def forget(self) -> None:
        """Forget the moments of earlier updates, as if there had been none."""
        self.optimizer.state.clear()
        self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of policy and optimizer. All ranks must call this; only rank 0 gets them."""
        moments = {
            f"{index}.{name}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        return {"policy": gather_to_rank0(trainable(self.policy)), "optimizer": gather_to_rank0(moments)}

    @torch.no_grad()
    def load_state_dict(self, policy: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Restore the tensors of policy and optimizer; the optimizer keeps its hyperparameters."""
        parameters = trainable(self.policy)
        for name, parameter in parameters.items():
            parameter.copy_(distribute_like(policy[name], parameter))
        by_index, state = list(parameters.values()), {}
        for key, value in optimizer.items():
            index, _, name = key.partition(".")
            value = value if name == "step" else distribute_like(value, by_index[int(index)])
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def recompute_activations(self) -> Iterator[None]:
        """Recompute activations if asked to. That works in train mode only, and sampling in eval mode only."""
        if not self.gradient_checkpointing:
            yield
            return
        with suppress_warnings():  # transformers 5.23 renames this function; 5.21 has no other
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.policy.train()
        try:
            yield
        finally:
            self.policy.eval()


@dataclass
class Totals:
    """The sums of an inner update over its micro-batches."""

    sums: Tensor  # (4,): loss; kl, entropy and clipped, summed over tokens
    ratio_min: Tensor
    ratio_max: Tensor
    logprobs: Tensor  # (B, C) of the policy before the update


def inner_update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    packed: bool,
    max_rows: int,
) -> tuple[UpdateStats, Tensor]:
    """Accumulate the gradient of the whole step over micro-batches of at most `max_rows` rows, clip it, apply it.

    Also returns the policy's log-probabilities before the update, (B, C): in the first inner update the policy is the
    one that sampled, so they are the old ones of the others.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = _accumulate(policy, batch, config, packed, max_rows)
    with oom_is_fatal("the optimizer's step"):
        sums = distributed.all_reduce_sum(totals.sums)
        low, high = distributed.all_reduce_min(totals.ratio_min), distributed.all_reduce_max(totals.ratio_max)
        figures, applied = clipped_step(policy, optimizer, config.clip_grad_norm, (sums, low, high))
    loss, kl, entropy, clipped, low, high, grad_norm = figures
    n, first = batch.sizes.num_tokens, batch.old_logprobs is None
    kl_mean = None if batch.ref_logprobs is None else kl / n
    entropy_mean = entropy / n if first else None
    return UpdateStats(loss, grad_norm, kl_mean, entropy_mean, clipped / n, low, high, applied), totals.logprobs


def clipped_step(
    policy: PreTrainedModel, optimizer: torch.optim.Optimizer, most: float, figures: Sequence[Tensor]
) -> tuple[list[float], bool]:
    """Sum the gradient over the ranks, clip its norm to `most`, and apply it if it and the loss are finite.

    `figures` are tensors, the loss first. Returns their numbers and the norm before clipping, and whether it was
    applied.
    """
    sum_gradients(policy.parameters())
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(policy.parameters(), most))
    numbers = torch.cat([x.reshape(-1) for x in (*figures, norm)]).tolist()  # one transfer from the device
    applied = isfinite(numbers[0]) and isfinite(numbers[-1])
    if applied:
        optimizer.step()
    return numbers, applied


def _accumulate(policy: PreTrainedModel, batch: Batch, config: TrainConfig, packed: bool, max_rows: int) -> Totals:
    """Run each micro-batch forward and backward; the gradients stay in the policy."""
    device, first = batch.advantages.device, batch.old_logprobs is None
    average = AVERAGES[config.loss_average]
    totals = Totals(
        torch.zeros(4, device=device),
        torch.full((), torch.inf, device=device),
        torch.full((), -torch.inf, device=device),
        torch.zeros(batch.tokens.completion_ids.shape, device=device),
    )
    for rows in split_microbatches(batch.advantages.shape[0], batch.tokens.num_generations, max_rows):
        micro = batch.slice_rows(rows)
        mask = micro.tokens.completion_mask
        with in_precision(policy):
            logprobs, entropy = completion_logprobs(
                policy,
                micro.tokens,
                config.temperature,
                packed=packed,
                entropy=first or bool(config.entropy_bonus),
                entropy_gradient=bool(config.entropy_bonus),
            )
            old_logprobs = logprobs.detach() if first else micro.old_logprobs
            tokens = grpo_loss(logprobs, old_logprobs, micro.ref_logprobs, micro.advantages, mask, config)
            loss = average(tokens.loss, mask, batch.sizes)
            if config.entropy_bonus:
                loss = loss - config.entropy_bonus * average(entropy, mask, batch.sizes)
            loss.backward()
        totals.logprobs[rows, : mask.shape[1]] = logprobs.detach()
        by_token = (tokens.kl, entropy.detach() if first else torch.zeros_like(tokens.kl), tokens.clipped.float())
        totals.sums += torch.stack([loss.detach(), *(torch.where(mask, x, 0.0).sum() for x in by_token)])
        totals.ratio_min = torch.minimum(totals.ratio_min, torch.where(mask, tokens.ratio, torch.inf).min())
        totals.ratio_max = torch.maximum(totals.ratio_max, torch.where(mask, tokens.ratio, -torch.inf).max())
    return totals


def watched_weights(policy: PreTrainedModel) -> Tensor:
    """Copy some WATCHED of the trainable weights, spread evenly over them, always the same ones."""
    parameters = list(map(local_tensor, trainable(policy).values()))
    stride = max(1, sum(p.numel() for p in parameters) // WATCHED) | 1  # odd, so that it meets every column
    return torch.cat([p.detach().flatten()[::stride] for p in parameters])


def moved_fraction(before: Tensor, after: Tensor) -> float:
    """Return the share of watched weights that changed, over all ranks."""
    moved = (before != after).float()
    counts = distributed.all_reduce_sum(torch.stack([moved.sum(), torch.ones_like(moved).sum()])).tolist()
    return counts[0] / max(1.0, counts[1])
