"""Token ids of prompts and completions: padding, masks, positions, slices, and the beginning that prompts share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.runtime.precision import precision

# Length in tokens. Sharing a shorter common beginning saves less time than the extra indexing costs.
SHARED_FROM = 64
# In 16 bits, sharing saves time from 16 tokens on, because copying keys and values takes a larger part of the time.
SHARED_FROM_16_BITS = 16


@dataclass(frozen=True)
class Tokens:
    """The tokens of N prompts and B = N · G completions, group-major."""

    prompt_ids: Tensor  # (N, P) int64, left-padded
    prompt_mask: Tensor  # (N, P) bool
    completion_ids: Tensor  # (B, C) int64, right-padded
    completion_mask: Tensor  # (B, C) bool, through the first end token, inclusive
    on_host: "Tokens | None" = None  # the same tokens on the CPU, to be read without waiting for the device
    packed: dict[int, Any] = field(init=False, default_factory=dict, repr=False)  # what `packed_inputs` has made

    @property
    def num_generations(self) -> int:
        """Return G."""
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    def completion_rows(self) -> list[list[int]]:
        """Return the token ids of each completion, with its end token."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]

    def to(self, device: torch.device | str) -> "Tokens":
        """Return the tokens, which are on the CPU, on `device`."""
        tensors = (self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask)
        return Tokens(*(tensor.to(device) for tensor in tensors), on_host=self)

    def slice_rows(self, rows: slice) -> "Tokens":
        """Return these rows, which are whole groups or a part of one, cut to their longest prompt and completion.

        If nothing is cut, return the tokens themselves, with what has been made for them.
        """
        host = self.on_host or self
        groups = prompts_of(rows, self.num_generations)
        left = self.prompt_mask.shape[1] - int(host.prompt_mask[groups].sum(-1).max())
        width = max(1, int(host.completion_mask[rows].sum(-1).max()))
        if left == 0 and (rows.stop - rows.start, width) == self.completion_ids.shape:
            return self
        return Tokens(
            self.prompt_ids[groups, left:],
            self.prompt_mask[groups, left:],
            self.completion_ids[rows, :width],
            self.completion_mask[rows, :width],
            self.on_host and self.on_host.slice_rows(rows),
        )


def tokens_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Tokens:
    """Return the padded tokens of prompts with one completion each; both are given as lists of ids."""
    lengths = torch.tensor([len(ids) for ids in completions])
    width = int(lengths.max())
    ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in completions])
    return Tokens(*left_pad(prompts, pad_id, ids.device), ids, length_mask(lengths, width)).to(device)


def prompts_of(rows: slice, num_generations: int) -> slice:
    """Return the slice of prompts that a slice of group-major rows belongs to."""
    return slice(rows.start // num_generations, -(-rows.stop // num_generations))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left; return their ids, (N, P) int64, and their mask, (N, P) bool."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return the mask, (B, `width`) bool, of right-padded rows with these lengths (B,)."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(-1)


def position_ids(mask: Tensor) -> Tensor:
    """Return the position of each left-padded token, in the shape of `mask`; 0 for padding too."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def last_columns(ids: Tensor, number: int) -> Tensor:
    """Return the indices of the last `number` columns of `ids` (N, L), for a model's argument `logits_to_keep`.

    If the number itself were given, the model would slice its hidden states. Without a gradient, torch would then
    copy the output layer for each row of the slice: 64 rows of smollm2 took 4.8 s and 3.4 GiB.
    """
    return torch.arange(ids.shape[1] - number, ids.shape[1], device=ids.device)


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that all prompts share, not counting the last token of any prompt."""
    smallest, largest = min(prompts), max(prompts)  # the other lists sort between these, so they begin alike too
    alike = next((i for i, (x, y) in enumerate(zip(smallest, largest, strict=False)) if x != y), len(smallest))
    return min(alike, min(map(len, prompts)) - 1)


def shared_from(model: PreTrainedModel) -> int:
    """Return how many tokens a common beginning must have for sharing it to save time with this model."""
    return SHARED_FROM if precision(model) == "float32" else SHARED_FROM_16_BITS


def shared_beginning(ids: Tensor, mask: Tensor, least: int) -> int:
    """Return the length of the common beginning of left-padded prompts (N, P); 0 if it is shorter than `least`."""
    rows = zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)
    common = common_prefix_length([row[len(row) - length :] for row, length in rows])
    return common if common >= least else 0
