"""One inner update: loss, gradient, and the optimizer's step, which is skipped if loss or gradient is not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.loss import AVERAGES, StepSizes, grpo_loss, token_kl
from grpo.algorithm.rollout import Rollout
from grpo.algorithm.schedules import StepSettings
from grpo.config import TrainConfig
from grpo.model.lora import trainable
from grpo.runtime.console import suppress_warnings
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks, full_tensor
from grpo.runtime.sharding import distribute_like
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
    def from_rollout(
        cls, rollout: Rollout, config: TrainConfig, ranks: Ranks = ONE, device: torch.device | str = "cpu"
    ) -> "Batch":
        """Make a batch, on `device`, of this rank's rows of a rollout, with the denominators of the whole step."""
        tokens = rollout.loss_tokens(config)
        num_completions = max(1, int(rollout.applies.sum()))
        num_tokens = max(1, int(tokens.completion_mask.sum()))
        rows = ranks.own_slice(len(rollout.advantages))
        own_tokens = tokens.slice_rows(rows).to(device)
        sizes = StepSizes(num_completions, num_tokens, config.max_new_tokens)
        return cls(own_tokens, rollout.advantages[rows].to(device), sizes)

    def kl(self, ranks: Ranks) -> float:
        """Return the mean KL from the policy that sampled to the reference, in nats per token, over all ranks."""
        kl = token_kl(self.old_logprobs, self.ref_logprobs)
        total = torch.where(self.tokens.completion_mask, kl, 0.0).sum()
        return ranks.all_reduce(total).item() / self.sizes.num_tokens

    def slice_rows(self, rows: slice) -> "Batch":
        """Return these rows, whole groups or a part of one group, cut to their longest prompt and completion."""
        tokens = self.tokens.slice_rows(rows)
        width = tokens.completion_ids.shape[1]
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows, :width]
        old = None if self.old_logprobs is None else self.old_logprobs[rows, :width]
        return replace(self, tokens=tokens, advantages=self.advantages[rows], ref_logprobs=ref, old_logprobs=old)


@contextmanager
def unchanged_if_failed(numbers: list[Tensor]) -> Iterator[None]:
    """Restore these tensors if the block raises an error.

    AdamW counts a step before it changes a weight. If memory ran out in between, the repeated step would be counted
    twice.
    """
    before = [number.clone() for number in numbers]
    try:
        yield
    except RuntimeError:
        for number, value in zip(numbers, before, strict=True):
            number.copy_(value)
        raise


@dataclass(frozen=True)
class Update:
    """The result of one inner update."""

    loss: float
    grad_norm: float  # before clipping
    applied: bool  # False if the weights are unchanged, because loss or gradient was not finite
    logprobs: Tensor  # (B, C), of the policy before the update
    entropies: Tensor | None  # (B, C) nats, of the policy before the update; None after the first inner update


class Updater:
    """The policy's optimizer; `update, batch = updater(batch, settings)` makes one inner update."""

    def __init__(
        self,
        policy: PreTrainedModel,
        config: TrainConfig,
        scorer: Scorer,
        microbatch: AdaptiveMicrobatch,
        ranks: Ranks = ONE,
    ) -> None:
        """Make the optimizer. `microbatch` limits the rows of a pass."""
        self.policy, self.config, self.scorer = policy, config, scorer
        self.microbatch, self.ranks = microbatch, ranks
        self.optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.has_begun = False  # True from the first update of a step until the caller has counted the step
        self.reset()

    def reset(self) -> None:
        """Reset the optimizer: make all moments again, with the value 0.

        If AdamW made them in its first step, and memory ran out at that moment, some moments would be missing.
        """
        self.skipped_in_a_row = 0  # number of updates skipped in a row, up to the latest update
        self.optimizer.state.clear()
        self._make_moments()

    def _make_moments(self) -> None:
        """Make the moments that are missing, all 0."""
        for p in self.optimizer.param_groups[0]["params"]:
            if p not in self.optimizer.state:
                step = torch.zeros((), device=p.device)
                zeros = [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2)]
                self.optimizer.state[p] = {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}

    def __call__(self, batch: Batch, settings: StepSettings) -> tuple[Update, Batch]:
        """Update the policy; return the result, and the batch with `old_logprobs` from the first update."""
        self.has_begun = True
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate
        with self.recompute_activations() if self.config.gradient_checkpointing else nullcontext():
            update = self.microbatch.run(lambda rows: self.inner_update(batch, settings.beta, rows))
        self.optimizer.zero_grad(set_to_none=True)  # frees memory for the next rollout
        if batch.old_logprobs is None:  # the policy was still the one that sampled
            batch = replace(batch, old_logprobs=update.logprobs)
        return update, batch

    def inner_update(self, batch: Batch, beta: float, rows_per_pass: int) -> Update:
        """Accumulate the gradient of the whole step over micro-batches, clip it, and apply it if it is finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, logprobs, entropies = self._accumulate(batch, beta, rows_per_pass)
        with self.ranks.end_if_out_of_memory("the optimizer's step"):
            loss, norm, applied = self.apply_gradient(self.ranks.all_reduce(loss))
        return Update(loss, norm, applied, logprobs, entropies if batch.old_logprobs is None else None)

    def _accumulate(self, batch: Batch, beta: float, rows_per_pass: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run each micro-batch forward and backward; the gradients add up in the policy's parameters.

        Return the loss, a scalar, and the log-probabilities and entropies of all tokens, (B, C) each. After
        the first inner update, the entropies are 0.
        """
        c = self.config
        first = batch.old_logprobs is None
        has_bonus = c.entropy_bonus != 0
        average = AVERAGES[c.loss_average]
        loss_sum = torch.zeros((), device=batch.advantages.device)
        all_logprobs = torch.zeros(batch.tokens.completion_ids.shape, device=batch.advantages.device)  # (B, C)
        all_entropies = torch.zeros_like(all_logprobs)
        for rows in split_microbatches(len(batch.advantages), batch.tokens.num_generations, rows_per_pass):
            micro = batch.slice_rows(rows)
            mask = micro.tokens.completion_mask
            with in_precision(self.policy):
                logprobs, entropies = self.scorer.scores(
                    self.policy, micro.tokens, c.temperature, first or has_bonus, entropy_gradient=has_bonus
                )
                old_logprobs = logprobs.detach() if first else micro.old_logprobs
                tokens = grpo_loss(logprobs, old_logprobs, micro.ref_logprobs, micro.advantages, mask, c, beta)
                loss = average(tokens.loss, mask, batch.sizes)
                if has_bonus:
                    loss = loss - c.entropy_bonus * average(entropies, mask, batch.sizes)
                loss.backward()
            loss_sum += loss.detach()
            all_logprobs[rows, : mask.shape[1]] = logprobs.detach()
            if first:
                all_entropies[rows, : mask.shape[1]] = entropies.detach()
        return loss_sum, all_logprobs, all_entropies

    def apply_gradient(self, loss: Tensor) -> tuple[float, float, bool]:
        """Sum the gradient over the ranks, clip its norm, and apply it if gradient and loss are finite.

        Return the loss, the norm before clipping, and whether the gradient was applied.
        """
        self.ranks.sum_gradients(self.policy.parameters())
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip_grad_norm))
        loss, norm = torch.stack([loss, norm]).tolist()  # one transfer from the device
        applied = isfinite(loss) and isfinite(norm)
        if applied:
            with unchanged_if_failed([entry["step"] for entry in self.optimizer.state.values()]):
                self.optimizer.step()
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        return loss, norm, applied

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of policy and optimizer, without moments that are still 0.

        All ranks must call this; only rank 0 gets the tensors.
        """
        moments = (
            (f"{index}.{name}", value)
            for index, entry in self.optimizer.state_dict()["state"].items()
            if entry["step"]
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
        self._make_moments()

    @contextmanager
    def recompute_activations(self) -> Iterator[None]:
        """In the `with` block, recompute activations in backward passes. Transformers does so in train mode only."""
        with suppress_warnings():  # transformers 5.23 warns that this method is deprecated; 5.21 has no other
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.policy.train()
        try:
            yield
        finally:
            self.policy.eval()
