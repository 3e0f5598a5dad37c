"""Token ids of prompts and completions: padding, positions, slicing. All of it has its one home here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.runtime.precision import precision

# Tokens. A shorter common beginning is not worth its bookkeeping in rollouts and updates.
SHARED_FROM = 64
# In 16 bits products cost less of the time, and copies of keys and values more.
SHARED_FROM_16_BITS = 16


@dataclass(frozen=True)
class Tokens:
    """The tokens of N prompts and B = N · G completions, group-major."""

    prompt_ids: Tensor  # (N, P) int64, left-padded
    prompt_mask: Tensor  # (N, P) bool
    completion_ids: Tensor  # (B, C) int64, right-padded
    completion_mask: Tensor  # (B, C) bool, through the first end token, inclusive

    @property
    def num_generations(self) -> int:
        """Return G."""
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    def completion_rows(self) -> list[list[int]]:
        """Return the ids of each completion, the token that ended it included."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]

    def to(self, device: torch.device | str) -> "Tokens":
        """Return a copy on `device`."""
        return Tokens(
            self.prompt_ids.to(device),
            self.prompt_mask.to(device),
            self.completion_ids.to(device),
            self.completion_mask.to(device),
        )

    def slice_rows(self, rows: slice) -> "Tokens":
        """Return some rows, whole groups or a part of one, trimmed to their longest prompt and completion."""
        groups = prompts_of(rows, self.num_generations)
        left = int(self.prompt_mask[groups].any(0).long().argmax())
        width = max(1, int(self.completion_mask[rows].sum(-1).max()))
        return Tokens(
            self.prompt_ids[groups, left:],
            self.prompt_mask[groups, left:],
            self.completion_ids[rows, :width],
            self.completion_mask[rows, :width],
        )


def tokens_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Tokens:
    """Return the tokens of prompts with one completion each, from lists of ids."""
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in completions], device=device)
    return Tokens(*left_pad(prompts, pad_id, device), ids, length_mask(lengths, width))


def prompts_of(rows: slice, num_generations: int) -> slice:
    """Return the prompts that some group-major rows belong to."""
    return slice(rows.start // num_generations, -(-rows.stop // num_generations))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: (N, P) int64 ids and (N, P) bool mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the mask (B, `width`) bool of right-padded rows of these lengths (B,)."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)


def position_ids(mask: Tensor) -> Tensor:
    """Return the positions of left-padded tokens: 0 at the first token that is not padding; shape of `mask`."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def last_columns(ids: Tensor, number: int) -> Tensor:
    """Return the indices (`number`,) of the last columns of (N, L): the `logits_to_keep` of a pass over several rows.

    Given a number, a model slices its hidden states, and torch multiplies slices of several rows with a copy of the
    output layer for each, where that needs no gradient: 64 rows of smollm2 took 4.8 s and 3.4 GiB.
    """
    return torch.arange(ids.shape[1] - number, ids.shape[1], device=ids.device)


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, but not the last of any: its logits are needed."""
    first, last = min(prompts), max(prompts)  # in the order of lists, so all others begin as these two do
    alike = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), len(first))
    return min(alike, min(map(len, prompts)) - 1)


def shared_from(model: PreTrainedModel) -> int:
    """Return from how many tokens on a common beginning is shared in the passes of a model."""
    return SHARED_FROM if precision(model) == "float32" else SHARED_FROM_16_BITS


def shared_beginning(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> int:
    """Return how many tokens all left-padded prompts (N, P) begin with; 0 if they are too few to be shared."""
    rows = zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)
    common = common_prefix_length([row[len(row) - length :] for row, length in rows])
    return common if common >= shared_from(model) else 0
