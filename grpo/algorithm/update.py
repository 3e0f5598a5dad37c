"""One inner update: loss, gradient, and the optimizer's step, which is skipped if either is not finite."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.loss import AVERAGES, StepSizes, TokenLoss, grpo_loss
from grpo.algorithm.rollout import Rollout
from grpo.algorithm.schedules import StepSettings
from grpo.config import TrainConfig
from grpo.model.lora import trainable
from grpo.runtime.console import suppress_warnings
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks, full_tensor
from grpo.runtime.sharding import distribute_like
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.scorer import Scorer
from grpo.scoring.tokens import Tokens


@dataclass(frozen=True)
class Batch:
    """The input of an inner update: the rows of a whole step, of one rank, or of a micro-batch."""

    tokens: Tokens
    advantages: Tensor  # (B,)
    sizes: StepSizes
    ref_logprobs: Tensor | None = None  # (B, C); None if there is no reference
    old_logprobs: Tensor | None = None  # (B, C); None until the first inner update has computed them

    @classmethod
    def of_step(
        cls, tokens: Tokens, advantages: Tensor, max_new_tokens: int, num_completions: int | None = None
    ) -> "Batch":
        """Make a batch of all rows of a step. `num_completions` of them count in the loss, by default all."""
        num_tokens = max(1, int(tokens.completion_mask.sum()))
        n = advantages.shape[0] if num_completions is None else max(1, num_completions)
        return cls(tokens, advantages, StepSizes(n, num_tokens, max_new_tokens))

    @classmethod
    def from_rollout(cls, rollout: Rollout, config: TrainConfig, ranks: Ranks = ONE) -> "Batch":
        """Make a batch of this rank's rows of a rollout, with the denominators of the whole step."""
        num_completions = int(rollout.applies.sum())
        batch = cls.of_step(rollout.loss_tokens(config), rollout.advantages, config.max_new_tokens, num_completions)
        return batch.slice_rows(ranks.own_slice(len(rollout.advantages)))

    def slice_rows(self, rows: slice) -> "Batch":
        """Return these rows, which are whole groups or a part of one, cut to their longest prompt and completion."""
        tokens = self.tokens.slice_rows(rows)
        width = tokens.completion_ids.shape[1]
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows, :width]
        old = None if self.old_logprobs is None else self.old_logprobs[rows, :width]
        return replace(self, tokens=tokens, advantages=self.advantages[rows], ref_logprobs=ref, old_logprobs=old)


@dataclass(frozen=True)
class UpdateStats:
    """Measurements of one inner update. KL, entropy and clip fraction are means over the step's completion tokens."""

    loss: float
    grad_norm: float  # before clipping
    kl: float | None  # None if there is no reference
    entropy: float | None  # measured in the first inner update only, else None
    clip_fraction: float
    ratio_min: float  # inf if all completions are masked
    ratio_max: float  # -inf if all completions are masked
    applied: bool  # False if the weights are unchanged, because loss or gradient was not finite


class Totals:
    """Sums, minima and maxima over the micro-batches of an inner update, on the device."""

    def __init__(self, completion_ids: Tensor) -> None:
        """Begin with no tokens, for a batch with these completions, (B, C)."""
        device = completion_ids.device
        self.sums = torch.zeros(4, device=device)  # loss, kl, entropy, number of clipped tokens
        self.ratio_min = torch.full((), torch.inf, device=device)
        self.ratio_max = torch.full((), -torch.inf, device=device)
        self.logprobs = torch.zeros(completion_ids.shape, device=device)  # (B, C), before the update

    def add(self, loss: Tensor, tokens: TokenLoss, entropy: Tensor | None, mask: Tensor) -> None:
        """Add the loss of a micro-batch, and the values of the tokens for which `mask` (B, C) is True."""
        entropy = torch.zeros_like(tokens.kl) if entropy is None else entropy
        by_token = (tokens.kl, entropy, tokens.clipped.float())
        self.sums += torch.stack([loss, *(torch.where(mask, x, 0.0).sum() for x in by_token)])
        self.ratio_min = torch.minimum(self.ratio_min, torch.where(mask, tokens.ratio, torch.inf).min())
        self.ratio_max = torch.maximum(self.ratio_max, torch.where(mask, tokens.ratio, -torch.inf).max())


class Updater:
    """The policy's optimizer; `stats, batch = updater(batch, settings)` makes one inner update."""

    def __init__(
        self,
        policy: PreTrainedModel,
        config: TrainConfig,
        scorer: Scorer,
        microbatch: AdaptiveMicrobatch,
        clock: Stopwatch,
        ranks: Ranks = ONE,
    ) -> None:
        """Make the optimizer. `microbatch` limits the rows of a pass; the time of updates is added to `clock`."""
        self.policy, self.config, self.scorer = policy, config, scorer
        self.microbatch, self.clock, self.ranks = microbatch, clock, ranks
        self.optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.skipped_in_a_row = 0  # how many of the latest updates, without a gap, were not finite and skipped
        self.has_begun = False  # True from the first update of a step until the caller has counted the step

    def __call__(self, batch: Batch, settings: StepSettings) -> tuple[UpdateStats, Batch]:
        """Update the policy; return the measurements, and the batch with `old_logprobs` from the first update."""
        self.has_begun = True
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate
        recomputing = self.recompute_activations() if self.config.gradient_checkpointing else nullcontext()
        with self.clock("update"), recomputing:
            stats, logprobs = self.microbatch.run(lambda rows: self.inner_update(batch, settings.beta, rows))
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for the next rollout
        if batch.old_logprobs is None:  # the policy was still the one that sampled
            batch = replace(batch, old_logprobs=logprobs)
        return stats, batch

    def inner_update(self, batch: Batch, beta: float, rows_per_pass: int) -> tuple[UpdateStats, Tensor]:
        """Accumulate the gradient of the whole step over micro-batches, clip it, and apply it.

        Return the measurements, and the policy's log-probabilities before the update, (B, C).
        """
        self.optimizer.zero_grad(set_to_none=True)
        totals = self._accumulate(batch, beta, rows_per_pass)
        with self.ranks.end_if_out_of_memory("the optimizer's step"):
            sums = self.ranks.all_reduce(totals.sums)
            lowest = self.ranks.all_reduce(totals.ratio_min, "min")
            highest = self.ranks.all_reduce(totals.ratio_max, "max")
            numbers, applied = self.apply_gradient((sums, lowest, highest))
        loss, kl, entropy, clipped, ratio_min, ratio_max, grad_norm = numbers
        n = batch.sizes.num_tokens
        stats = UpdateStats(
            loss=loss,
            grad_norm=grad_norm,
            kl=None if batch.ref_logprobs is None else kl / n,
            entropy=entropy / n if batch.old_logprobs is None else None,
            clip_fraction=clipped / n,
            ratio_min=ratio_min,
            ratio_max=ratio_max,
            applied=applied,
        )
        return stats, totals.logprobs

    def _accumulate(self, batch: Batch, beta: float, rows_per_pass: int) -> Totals:
        """Run each micro-batch forward and backward; the gradients add up in the policy's parameters."""
        c = self.config
        first = batch.old_logprobs is None
        average = AVERAGES[c.loss_average]
        totals = Totals(batch.tokens.completion_ids)
        for rows in split_microbatches(len(batch.advantages), batch.tokens.num_generations, rows_per_pass):
            micro = batch.slice_rows(rows)
            mask = micro.tokens.completion_mask
            with in_precision(self.policy):
                if first or c.entropy_bonus:
                    logprobs, entropy = self.scorer.logprobs_and_entropies(
                        self.policy, micro.tokens, c.temperature, entropy_gradient=bool(c.entropy_bonus)
                    )
                else:
                    logprobs, entropy = self.scorer.logprobs(self.policy, micro.tokens, c.temperature), None
                old_logprobs = logprobs.detach() if first else micro.old_logprobs
                tokens = grpo_loss(logprobs, old_logprobs, micro.ref_logprobs, micro.advantages, mask, c, beta)
                loss = average(tokens.loss, mask, batch.sizes)
                if c.entropy_bonus:
                    loss = loss - c.entropy_bonus * average(entropy, mask, batch.sizes)
                loss.backward()
            totals.logprobs[rows, : mask.shape[1]] = logprobs.detach()
            totals.add(loss.detach(), tokens, entropy.detach() if first else None, mask)
        return totals

    def apply_gradient(self, figures: Sequence[Tensor]) -> tuple[list[float], bool]:
        """Sum the gradient over the ranks, clip its norm, and apply it if gradient and loss are finite.

        `figures` are tensors on the device, the loss first. Return their values, followed by the norm before
        clipping, and whether the gradient was applied.
        """
        self.ranks.sum_gradients(self.policy.parameters())
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip_grad_norm))
        numbers = torch.cat([x.reshape(-1) for x in (*figures, norm)]).tolist()  # one transfer from the device
        applied = isfinite(numbers[0]) and isfinite(numbers[-1])
        if applied:
            self.optimizer.step()
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        return numbers, applied

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of policy and optimizer. All ranks must call this; only rank 0 gets the tensors."""
        moments = (
            (f"{index}.{name}", value)
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        )
        return {
            "policy": self.ranks.collect(trainable(self.policy).items()),
            "optimizer": self.ranks.collect(moments),
        }

    @torch.no_grad()
    def load_state_dict(self, policy: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Restore the tensors of policy and optimizer; the optimizer keeps its hyperparameters."""
        parameters = trainable(self.policy)
        for name, parameter in parameters.items():
            parameter.copy_(distribute_like(policy[name], parameter))
        by_index = list(parameters.values())
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in optimizer.items():
            index, _, name = key.partition(".")
            value = value if name == "step" else distribute_like(value, by_index[int(index)])
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def recompute_activations(self) -> Iterator[None]:
        """Recompute activations in the block. Transformers does so in train mode only."""
        with suppress_warnings():  # transformers 5.23 renames this function; 5.21 has no other
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.policy.train()
        try:
            yield
        finally:
            self.policy.eval()
