"""The reference: the frozen model that the KL is measured against."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config import TrainConfig
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.runtime.precision import in_precision, lower_weights
from grpo.runtime.sharding import distribute_like
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.attention.packed import enable
from grpo.scoring.scorer import Scorer
from grpo.scoring.tokens import Tokens


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model, with weights in the precision of its passes and without gradients."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    lower_weights(frozen)
    return frozen


class Reference:
    """The reference: a frozen copy of the policy, the policy with its adapter off, or none if beta is 0."""

    def __init__(
        self,
        policy: PreTrainedModel,
        frozen: PreTrainedModel | None,
        config: TrainConfig,
        scorer: Scorer,
        microbatch: AdaptiveMicrobatch,
        clock: Stopwatch,
    ) -> None:
        """Keep `frozen`, a copy of the policy, or None if the policy has an adapter or beta is 0."""
        if frozen is not None and scorer.shares_prompts:
            enable(frozen)  # the probe has already done this for the policy
        self.policy, self.frozen, self.config = policy, frozen, config
        self.scorer, self.microbatch, self.clock = scorer, microbatch, clock

    def logprobs(self, tokens: Tokens) -> Tensor | None:
        """Return the reference's log-probabilities of the completion tokens, (B, C); None if beta is 0."""
        with self.clock("reference"):
            if self.config.beta == 0:
                return None
            model = self.frozen or self.policy
            with nullcontext() if self.frozen else model.disable_adapter():
                return self.microbatch.run(
                    lambda rows: logprobs_in_passes(self.scorer, model, tokens, self.config.temperature, rows)
                )

    def sync_if_due(self, step: int) -> None:
        """Copy the policy to the reference after every `ref_model_sync_steps` steps."""
        every = self.config.ref_model_sync_steps
        if every and step % every == 0:
            self.sync()

    def sync(self) -> None:
        """Copy the policy to the reference."""
        self.frozen.load_state_dict(self.policy.state_dict())

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the parameters of the frozen copy, by name."""
        for name, parameter in self.frozen.named_parameters():
            parameter.copy_(distribute_like(tensors[name], parameter))


@torch.no_grad()
def logprobs_in_passes(
    scorer: Scorer, model: PreTrainedModel, tokens: Tokens, temperature: float, rows_per_pass: int
) -> Tensor:
    """Return a model's log-probabilities of the completion tokens, (B, C), without gradients."""
    logprobs = torch.zeros(tokens.completion_ids.shape, device=tokens.completion_ids.device)
    for rows in split_microbatches(logprobs.shape[0], tokens.num_generations, rows_per_pass):
        with in_precision(model):
            part = scorer.logprobs(model, tokens.slice_rows(rows), temperature)
        logprobs[rows, : part.shape[1]] = part
    return logprobs
