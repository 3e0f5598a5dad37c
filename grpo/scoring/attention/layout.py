"""The order of a packed row, and the indices that split it into prompts and completions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo.runtime.device import TRAITS
from grpo.scoring.tokens import length_mask

# Prompts and completions are padded to a multiple of 8 columns, so that few shapes occur. The CPU does this only with
# a common beginning; other devices always, because they keep memory or kernels for each shape.
COLUMN_MULTIPLE = 8


@dataclass(frozen=True)
class IndexMaps:
    """Indices that split a row of T · H vectors into prompts and completions, and join them again.

    In the row, the H vectors of a token are side by side. In prompts (N · H · P, …) and completions (B · H · C, …),
    the vectors of a head are side by side, padded on the right. All tensors are int64.
    """

    index: Tensor  # (N · H · P + B · H · C,) where each vector is in the row; an arbitrary index for padding
    padding: Tensor  # the positions in `index` that are padding
    prompts: Tensor  # where the real vectors are among the prompts' vectors, in the order of the row
    completions: Tensor  # where the real vectors are among the completions' vectors, in the order of the row
    num_prompts: int  # N · H · P
    filler: int  # number of vectors at the start of the row that belong to no prompt or completion

    def split(self, row: Tensor, padding: float | None = None) -> tuple[Tensor, Tensor]:
        """Split a row (T · H, …) into prompts and completions. Padding is set to `padding`, if it is given."""
        vectors = row.index_select(0, self.index)
        if padding is not None:
            vectors.index_fill_(0, self.padding, padding)
        return vectors[: self.num_prompts], vectors[self.num_prompts :]

    def join(self, prompts: Tensor, completions: Tensor, filler: float = 0) -> Tensor:
        """Join prompts and completions into a row (T · H, …)."""
        first_completion = self.filler + len(self.prompts)
        row = prompts.new_empty(first_completion + len(self.completions), *prompts.shape[1:])
        row[: self.filler] = filler
        torch.index_select(prompts, 0, self.prompts, out=row[self.filler : first_completion])
        torch.index_select(completions, 0, self.completions, out=row[first_completion:])
        return row


@dataclass(frozen=True)
class Layout:
    """The order of a packed row:

        [common beginning S][filler][prompts without their last token][last token of each prompt][completion tokens]

    So the tokens whose logits are needed are at the end. Lengths and indices do not count the common beginning. When
    a row is split, prompts without the common beginning (N, P) and completions (B, C) are padded on the right.

    On the CPU, only a row with a common beginning has filler, at most 1/16 of its tokens. With filler, few different
    row lengths occur, so a device's allocator can reuse memory and fewer kernels are made. A filler token attends to
    the common beginning alone, and no token attends to it.
    """

    prompt_lengths: Tensor  # (N,) int64, at least 1
    completion_lengths: Tensor  # (B,) int64, at least 0
    prompt_index: Tensor  # (N, P) int64, where each token is in the row; an arbitrary index for padding
    completion_index: Tensor  # (B, C) int64, where each token is in the row; an arbitrary index for padding
    prompt_tokens: int  # the sum of `prompt_lengths`
    completion_tokens: int  # the sum of `completion_lengths`
    common_prefix: int = 0  # S; every prompt has at least one more token
    filler: int = 0
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # index maps, masks, biases that layers share

    @classmethod
    def of(
        cls, prompt_lengths: Tensor, completion_lengths: Tensor, common_prefix: int, device: torch.device
    ) -> "Layout":
        """Make the layout on `device` from the lengths, on the CPU, of whole prompts (N,) and completions (B,)."""
        prompt_lengths = prompt_lengths - common_prefix
        p, c = prompt_lengths[:, None], completion_lengths[:, None]
        multiple = COLUMN_MULTIPLE if common_prefix or TRAITS[p.device.type].is_queued else 1
        filler = _filler(common_prefix + int(p.sum() + c.sum())) if multiple > 1 else 0
        i = _columns(p, multiple)
        j = _columns(c, multiple)
        body = p - 1  # lengths without the last token
        last = filler + body.sum() + torch.arange(len(p))[:, None]
        prompts = torch.where(i < body, filler + body.cumsum(0) - body + i, last)
        completions = torch.where(j < c, last[-1] + 1 + c.cumsum(0) - c + j, 0)
        tensors = (prompt_lengths, completion_lengths, prompts, completions)
        return cls(*(x.to(device) for x in tensors), int(p.sum()), int(c.sum()), common_prefix, filler)

    def maps(self, heads: int) -> IndexMaps:
        """Return the index maps of a row in which each token has `heads` vectors."""
        if ("maps", heads) not in self._cache:
            index, order = _vectors(self.prompt_index, self.prompt_lengths, heads)
            completion_index, completion_order = _vectors(self.completion_index, self.completion_lengths, heads)
            prompts, padding = order.tensor_split([heads * self.prompt_tokens])
            completions, more_padding = completion_order.tensor_split([heads * self.completion_tokens])
            self._cache["maps", heads] = IndexMaps(
                index=torch.cat([index, completion_index]),
                padding=torch.cat([padding, len(index) + more_padding]),
                prompts=prompts,
                completions=completions,
                num_prompts=len(index),
                filler=heads * self.filler,
            )
        return self._cache["maps", heads]

    def beginning_bias(self, window: int | None, repeats: int) -> Tensor | None:
        """Return the bias to add to scores for the common beginning, (1, R · T, S) with R = `repeats`.

        Return None without a sliding window: all T tokens after the beginning see the whole beginning.
        """
        if window is None:
            return None
        if ("beginning", window, repeats) not in self._cache:
            lengths = self.prompt_lengths.repeat_interleave(self.num_generations)[:, None]
            i = torch.arange(self.prompt_index.shape[1], device=lengths.device)
            j = torch.arange(self.completion_index.shape[1], device=lengths.device)
            after = self.maps(1).join(i.repeat(len(self.prompt_lengths)), (lengths + j).flatten())  # (T,)
            distance = self.common_prefix + after[:, None] - torch.arange(self.common_prefix, device=after.device)
            bias = as_bias(distance < window, torch.float32).repeat(repeats, 1)[None]
            self._cache["beginning", window, repeats] = bias
        return self._cache["beginning", window, repeats]

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the attention masks of prompts (1, 1, P, P) and of completions (B, 1, C, P + C), bool.

        No query sees later tokens, so only a prompt's padding, which is before its completions, must be hidden.
        """
        if ("masks", window) not in self._cache:
            lengths = self.prompt_lengths.repeat_interleave(self.num_generations)[:, None, None]  # (B, 1, 1)
            i = torch.arange(self.prompt_index.shape[1], device=lengths.device)
            j = torch.arange(self.completion_index.shape[1], device=lengths.device)
            reach = torch.inf if window is None else window
            to_prompt = (i < lengths) & (lengths + j[:, None] - i < reach)  # (B, C, P)
            to_completion = causal(j, reach).expand(len(lengths), -1, -1)
            masks = causal(i, reach)[None, None], torch.cat([to_prompt, to_completion], -1)[:, None]
            self._cache["masks", window] = masks
        return self._cache["masks", window]

    def biases(self, window: int | None, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both masks as biases to add to scores, (1, R · P, P) and (B · K, R · C, P + C) with R = H / K."""
        name = ("biases", window, heads, key_heads, dtype)
        if name not in self._cache:
            prompt_mask, completion_mask = self.masks(window)
            repeats = heads // key_heads
            prompts = as_bias(prompt_mask[0], dtype).repeat(1, repeats, 1)
            completions = as_bias(completion_mask, dtype).repeat(1, key_heads, repeats, 1).flatten(0, 1)
            self._cache[name] = prompts, completions
        return self._cache[name]

    def after_prompts(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Join keys or values of prompts (N · K, P, d) and their completions (B · K, C, d) into (B · K, P + C, d)."""
        n, g = len(self.prompt_lengths), self.num_generations
        repeated = prompts.unflatten(0, (n, 1, -1)).expand(-1, g, -1, -1, -1)  # (N, G, K, P, d)
        return torch.cat([repeated, completions.unflatten(0, (n, g, -1))], 3).flatten(0, 2)

    @property
    def num_generations(self) -> int:
        """Return G."""
        return len(self.completion_lengths) // len(self.prompt_lengths)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores, shaped like `seen`: 0 for a seen key, else the lowest finite number.

    With -inf instead, the attention of a query that sees no key, such as padding, would be NaN.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def causal(i: Tensor, reach: float) -> Tensor:
    """Return an (L, L) bool mask: each position in `i` (L,) sees itself and the `reach` - 1 positions before it."""
    return (i[:, None] >= i) & (i[:, None] - i < reach)


def _vectors(token_index: Tensor, lengths: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return where the vectors of M padded sequences are in the row, (M · H · L,), and their order there.

    The order (M · H · L,) lists the positions of the vectors that are not padding, as they follow each other in the
    row, and after them the positions of padding.
    """
    head = torch.arange(heads, device=lengths.device)[:, None]
    index = token_index[:, None] * heads + head  # (M, H, L)
    is_real = length_mask(lengths, token_index.shape[1])[:, None]
    return index.flatten(), index.masked_fill(~is_real, torch.iinfo(index.dtype).max).flatten().argsort()


def _columns(lengths: Tensor, multiple: int) -> Tensor:
    """Return column indices 0, …, L − 1, where L is the largest length, at least 1, rounded up to a multiple."""
    return torch.arange(-(-max(1, int(lengths.max())) // multiple) * multiple, device=lengths.device)


def _filler(total: int) -> int:
    """Return how many tokens to add to `total` to reach a multiple of the power of 2 that is 1/32 to 1/16 of it."""
    return -total % max(1, 2 ** (total.bit_length() - 5))
