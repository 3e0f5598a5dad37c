"""The reference: the frozen model that the KL is measured against."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config import TrainConfig
from grpo.runtime.distributed import distribute_like
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.runtime.precision import in_precision, lower_weights
from grpo.scoring.logprobs import completion_logprobs
from grpo.scoring.tokens import Tokens


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that is never trained."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    lower_weights(frozen)
    return frozen


class Reference:
    """A frozen copy of the policy, the policy with its adapter off, or none where beta is 0."""

    def __init__(
        self, policy: PreTrainedModel, frozen: PreTrainedModel | None, packed: bool, microbatch: AdaptiveMicrobatch
    ) -> None:
        """`frozen` is None where the policy has an adapter or beta is 0; `packed`: score packed rows."""
        self.policy, self.frozen, self.packed, self.microbatch = policy, frozen, packed, microbatch

    def logprobs(self, tokens: Tokens, config: TrainConfig) -> Tensor | None:
        """Return the reference's log-probabilities of a rollout, (B, C); None where beta is 0."""
        if config.beta == 0:
            return None
        with self._model() as model:
            return self.microbatch.run(reference_logprobs, model, tokens, config.temperature, self.packed)

    def sync(self) -> None:
        """Make the reference a copy of the policy as it is now."""
        self.frozen.load_state_dict(self.policy.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters of the frozen copy."""
        return dict(self.frozen.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the parameters of the frozen copy."""
        for name, parameter in self.frozen.named_parameters():
            parameter.copy_(distribute_like(tensors[name], parameter))

    @contextmanager
    def _model(self) -> Iterator[PreTrainedModel]:
        if self.frozen is not None:
            yield self.frozen
        else:
            with self.policy.disable_adapter():
                yield self.policy


@torch.no_grad()
def reference_logprobs(
    reference: PreTrainedModel, tokens: Tokens, temperature: float, packed: bool, max_rows: int
) -> Tensor:
    """Return a model's log-probabilities of a rollout, (B, C), at most `max_rows` rows in a pass."""
    logprobs = torch.zeros(tokens.completion_ids.shape, device=tokens.completion_ids.device)
    for rows in split_microbatches(logprobs.shape[0], tokens.num_generations, max_rows):
        with in_precision(reference):
            part, _ = completion_logprobs(reference, tokens.slice_rows(rows), temperature, packed=packed)
        logprobs[rows, : part.shape[1]] = part
    return logprobs
