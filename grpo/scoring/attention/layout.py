"""The order of a packed row, and where its tokens go when prompts and completions are taken apart."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class IndexMaps:
    """Indices between a row of T · H vectors, those of a token side by side, and its split form. All (…,) int64."""

    prompts: Tensor  # (N · H · P,) index in the row of each vector of the prompts; any index for padding
    completions: Tensor  # (B · H · C,) index in the row of each vector of the completions
    from_prompts: Tensor  # indices in `prompts` of the real vectors, in the order of the row, each once
    from_completions: Tensor  # indices in `completions` of the real vectors, in the order of the row
    prompt_padding: Tensor  # indices of padding in `prompts`
    completion_padding: Tensor  # indices of padding in `completions`
    filler: int = 0  # vectors that the row begins with and its split form lacks

    def split(self, row: Tensor, padding: float | None = None) -> tuple[Tensor, Tensor]:
        """Split a row (T · H, …) into prompts (N · H · P, …) and completions (B · H · C, …).

        Padding is that number, or by default what some token has.
        """
        prompts, completions = row.index_select(0, self.prompts), row.index_select(0, self.completions)
        if padding is not None:
            prompts.index_fill_(0, self.prompt_padding, padding)
            completions.index_fill_(0, self.completion_padding, padding)
        return prompts, completions

    def join(self, prompts: Tensor, completions: Tensor, filler: float = 0) -> Tensor:
        """Join prompts (N · H · P, …) and completions (B · H · C, …) to a row (T · H, …) after its filler."""
        split = self.filler + len(self.from_prompts)
        row = prompts.new_empty(split + len(self.from_completions), *prompts.shape[1:])
        row[: self.filler] = filler
        torch.index_select(prompts, 0, self.from_prompts, out=row[self.filler : split])
        torch.index_select(completions, 0, self.from_completions, out=row[split:])
        return row


@dataclass(frozen=True)
class Layout:
    """The order of a packed row: the S tokens that all prompts begin with, then the own tokens of the prompts but the
    last of each, those, then the completion tokens.

    In the split form, the own tokens of prompts (N, P) and completions (B, C) are padded on the right. The last token
    of a prompt comes with the completions because its logits are needed too: so the tokens whose logits are read are
    at the end. Indices and lengths are those of the row without the common beginning.

    A row with a common beginning comes in few lengths and widths, so that a device's allocator finds what it had, and
    few kernels are made: the own tokens begin with `filler`, at most 1/16 of the row. Such a token attends to the
    common beginning alone, and none to it.
    """

    prompt_lengths: Tensor  # (N,) int64, from 1
    completion_lengths: Tensor  # (B,) int64, from 0
    prompt_index: Tensor  # (N, P) int64, index in the row; any index for padding
    completion_index: Tensor  # (B, C) int64, index in the row; any index for padding
    common_prefix: int = 0  # S, at most all but the last token of each prompt
    filler: int = 0
    # computed by one layer, reused by the others
    _of_layers: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, prompt_lengths: Tensor, completion_lengths: Tensor, common_prefix: int = 0) -> "Layout":
        """Make the layout of prompts (N,) and completions (B,), group-major, of these lengths."""
        prompt_lengths = prompt_lengths - common_prefix
        p, c = prompt_lengths[:, None], completion_lengths[:, None]
        total = common_prefix + int(p.sum() + c.sum())
        unit, columns = (max(1, 2 ** (total.bit_length() - 5)), 8) if common_prefix else (1, 1)
        i = torch.arange(_round_up(int(p.max()), columns), device=p.device)
        j = torch.arange(_round_up(max(1, int(c.max())), columns), device=p.device)  # one at least, if of padding
        filler = _round_up(total, unit) - total
        body = p - 1
        last = filler + body.sum() + torch.arange(len(p), device=p.device)[:, None]
        prompts = torch.where(i < body, filler + body.cumsum(0) - body + i, last)
        completions = torch.where(j < c, last[-1] + 1 + c.cumsum(0) - c + j, 0)
        return cls(prompt_lengths, completion_lengths, prompts, completions, common_prefix, filler)

    def maps(self, heads: int) -> IndexMaps:
        """Return the indices of the vectors of `heads` heads."""
        if ("maps", heads) not in self._of_layers:
            prompts = _index_maps(self.prompt_index, self.prompt_lengths, heads)
            completions = _index_maps(self.completion_index, self.completion_lengths, heads)
            pairs = zip(prompts, completions, strict=True)
            self._of_layers["maps", heads] = IndexMaps(*(x for pair in pairs for x in pair), heads * self.filler)
        return self._of_layers["maps", heads]

    def beginning_bias(self, window: int | None, repeats: int) -> Tensor | None:
        """Return what to add to the scores of the own tokens for the common beginning, (1, R · T, S), R = `repeats`.

        None without a sliding window: all of them follow it.
        """
        if window is None:
            return None
        if ("beginning", window, repeats) not in self._of_layers:
            own, i = self.prompt_lengths, torch.arange(self.common_prefix, device=self.prompt_index.device)
            positions = i.new_zeros(int(self.filler + own.sum() + self.completion_lengths.sum()))
            starts = own.repeat_interleave(self.num_generations)
            for index, lengths, first in (
                (self.prompt_index, own, torch.zeros_like(own)),
                (self.completion_index, self.completion_lengths, starts),
            ):
                columns = torch.arange(index.shape[1], device=i.device)
                real = columns < lengths[:, None]
                positions[index[real]] = (self.common_prefix + first[:, None] + columns)[real]
            seen = positions[:, None] - i < window  # (T, S)
            self._of_layers["beginning", window, repeats] = as_bias(seen, torch.float32).repeat(repeats, 1)[None]
        return self._of_layers["beginning", window, repeats]

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the attention masks of prompts (1, 1, P, P) and of completions (B, 1, C, P + C), bool.

        Padding follows all real tokens, so only that of the prompts has to be hidden, from the completions.
        """
        if ("masks", window) not in self._of_layers:
            lengths = self.prompt_lengths.repeat_interleave(self.num_generations)[:, None, None]  # (B, 1, 1)
            i = torch.arange(self.prompt_index.shape[1], device=lengths.device)
            j = torch.arange(self.completion_index.shape[1], device=lengths.device)
            reach = torch.inf if window is None else window
            to_prompt = (i < lengths) & (lengths + j[:, None] - i < reach)  # (B, C, P)
            to_itself = causal(j, reach).expand(len(lengths), -1, -1)
            masks = causal(i, reach)[None, None], torch.cat([to_prompt, to_itself], -1)[:, None]
            self._of_layers["masks", window] = masks
        return self._of_layers["masks", window]

    def biases(self, window: int | None, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the masks as `as_bias` does: (1, R · P, P) and (B · K, R · C, P + C), R = H / K."""
        name = ("biases", window, heads, key_heads, dtype)
        if name not in self._of_layers:
            prompts, completions = (as_bias(mask, dtype) for mask in self.masks(window))
            repeats, (rows, _, _, width) = heads // key_heads, completions.shape
            completions = completions.repeat(1, key_heads, repeats, 1).view(rows * key_heads, -1, width)
            self._of_layers[name] = prompts[0].repeat(1, repeats, 1), completions
        return self._of_layers[name]

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completion_lengths) // len(self.prompt_lengths)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to scores, of the same shape: 0 where a key is seen, else a number lower than any of theirs.

    It is finite, so that a query that sees no key, such as padding, does not become NaN.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def causal(i: Tensor, reach: float) -> Tensor:
    """Return which of the positions `i` (L,) each of them sees, itself and the `reach` - 1 before it: (L, L) bool."""
    return (i[:, None] >= i) & (i[:, None] - i < reach)


def _index_maps(index: Tensor, lengths: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for tokens (M, L) the row index of each of the (M, H, L) vectors, the indices of the real vectors in the
    order of the row, and those of padding."""
    head = torch.arange(heads, device=index.device)[:, None]
    maps = (index[:, None] * heads + head).flatten()
    real = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
    real = real[:, None].expand(-1, heads, -1).flatten()
    own = real.nonzero().squeeze(-1)
    return maps, own[maps[own].argsort()], (~real).nonzero().squeeze(-1)
