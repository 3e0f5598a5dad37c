"""The forward passes of decoding: over the prompts, then one token a row, on a key/value cache in place.

`Decoder` says how that is done for a model. Each shortcut is tried once on the model (`probe.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.generation.cuda_graphs import CudaGraphDecoding
from grpo.runtime.ranks import ONE, Ranks
from grpo.scoring.attention.common_prefix import CommonPrefix
from grpo.scoring.attention.packed import enable
from grpo.scoring.tokens import common_prefix_length, last_columns, position_ids, shared_from

CAPACITY_STEP = 32  # tokens; the cache grows by this many at a time


def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, common_prefix: int = 0) -> tuple[DynamicCache, Tensor]:
    """Return the cache of N left-padded prompts (N, P), and the logits after them (N, V).

    The `common_prefix` tokens that all prompts begin with, a system prompt for instance, are run once; each row's
    cache gets them behind its own padding, where they belong anyway: N · (P − S) + S tokens instead of N · P, exact
    in float32.
    """
    cache = cache_behind_padding(model, ids, mask, common_prefix) if common_prefix else DynamicCache()
    out = model(
        input_ids=ids[:, common_prefix:],
        attention_mask=mask.long(),
        position_ids=position_ids(mask)[:, common_prefix:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_columns(ids[:, common_prefix:], 1),
    )
    return cache, out.logits[:, -1]


def cache_behind_padding(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> DynamicCache:
    """Return the cache of the `length` tokens that all prompts begin with, in each row behind its own padding."""
    cache = prefill_prefix(model, ids, mask, length)
    columns, padding = torch.arange(length, device=ids.device), (~mask).sum(-1, keepdim=True)
    source = (columns - padding).clamp(min=0)  # (N, S); columns before a row's first token are masked
    for layer in cache.layers:
        layer.keys = layer.keys[0][:, source].transpose(0, 1)
        layer.values = layer.values[0][:, source].transpose(0, 1)
    return cache


def prefill_prefix(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> DynamicCache:
    """Return the cache of the `length` tokens that all left-padded prompts (N, P) begin with, one row."""
    cache, padding = DynamicCache(), (~mask).sum(-1)
    row, first = padding.argmin(), int(padding.min())
    start = ids[row, first : first + length][None]  # (1, S)
    model(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        position_ids=torch.arange(length, device=ids.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def prefill_own(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int
) -> tuple[CommonPrefix, DynamicCache, Tensor, Tensor]:
    """Return what all N left-padded prompts (N, P) begin with, `length` tokens, held once, and of all after it the
    cache, the mask of its columns (N, P - S), and the logits after it (N, V).

    Raises ValueError if the model's layers do more than keep all keys and values.
    """
    enable(model)
    layers = prefill_prefix(model, ids, mask, length).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError("no common prefix in decoding with such a cache")
    prefix = CommonPrefix([layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])
    positions, cache = position_ids(mask), DynamicCache()
    own = (mask & (positions >= length))[:, length:]  # in the others, the beginning goes on behind the padding
    seen = own[:, None] & torch.ones(2 * own.shape[1:], dtype=torch.bool, device=mask.device).tril()
    out = model(
        input_ids=ids[:, length:],
        attention_mask=prefix.bias(seen),
        position_ids=positions[:, length:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_columns(ids[:, length:], 1),
        common_prefix=prefix,
    )
    return prefix, cache, own, out.logits[:, -1]


class PreallocatedLayer(DynamicLayer):
    """KV-cache layer with spare capacity, appended in place; `DynamicLayer` copies the whole cache a token."""

    def __init__(self, layer: DynamicLayer, repeats: int) -> None:
        """Take over a layer of N rows, (N, heads, length, size), each row `repeats` times."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        if layer.device.type != "cpu":  # else transformers reads each mask, to drop one that masks nothing
            self.is_compileable = True
        self._length = layer.keys.shape[-2]
        self._buffers = tuple(reserve(x, repeats) for x in (layer.keys, layer.values))
        self._update_views()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; return the keys and values of all."""
        start, end = self._length, self._length + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = tuple(reserve(x, 1, end - start) for x in (self.keys, self.values))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._length = end
        self._update_views()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in the same memory."""
        for x in self._buffers:
            x[: len(indices), :, : self._length] = x[:, :, : self._length][indices]
        self._buffers = tuple(x[: len(indices)] for x in self._buffers)
        self._update_views()

    def _update_views(self) -> None:
        self.keys, self.values = (x[:, :, : self._length] for x in self._buffers)


def reserve(x: Tensor, repeats: int, more: int = 0) -> Tensor:
    """Copy (N, heads, length, size) with each row `repeats` times and room for CAPACITY_STEP or `more` tokens."""
    n, heads, length, size = x.shape
    buffer = x.new_empty(n, repeats, heads, length + max(CAPACITY_STEP, more), size)
    buffer[..., :length, :] = x[:, None]
    return buffer.flatten(0, 1)


class CachedDecoding:
    """Forward passes after the prompts: from a token of every row (B,) to the logits after it (B, V)."""

    can_shrink = True  # rows can be dropped

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        mask: Tensor,
        repeats: int,
        columns: int,
        prefix: CommonPrefix | None = None,
    ) -> None:
        """Start from the cache of N prompts with mask (N, P), each `repeats` times, for at most `columns` tokens.

        `prefix` is what all prompts begin with, held once for all rows; then the cache and the mask are of the rest.
        """
        self.prefix = prefix
        # layers of another class are a model's own and know how to repeat themselves
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = PreallocatedLayer(layer, repeats)
            elif repeats > 1:
                layer.batch_repeat_interleave(repeats)
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model, self.cache, self.width = model, cache, mask.shape[1]
        self.position = mask.sum(-1, keepdim=True) + (prefix.length if prefix else 0)  # (B, 1), of the next token
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token of each row (B,)."""
        self.width += 1
        mask, more = self.mask[:, : self.width], {}
        if self.prefix is not None:
            mask, more = self.prefix.bias(mask[:, None] != 0), {"common_prefix": self.prefix}
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        self.position = self.position + 1
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]


@dataclass(frozen=True)
class Decoder:
    """How the prompts of a model are continued. The default is right for any model; the rest are shortcuts."""

    expands_cache: bool = False  # run each prompt once, and copy its cache for each completion of its group
    shares_prefix: bool = False  # run what all prompts begin with once
    holds_prefix: bool = False  # hold it once for all rows while decoding
    uses_cuda_graphs: bool = False
    ranks: Ranks = ONE  # the processes that the model is sharded over: they make every pass together

    def common_prefix(self, prompts: Sequence[Sequence[int]], least: int = 1) -> int:
        """Return how many tokens all prompts begin with, to be run once; 0 if they are fewer than `least`."""
        common = common_prefix_length(prompts) if self.shares_prefix else 0
        common = min(self.ranks.gather(common))  # ranks that make every pass together run the same ones
        return common if common >= least else 0

    def begin(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, columns: int, common_prefix: int
    ) -> tuple[CachedDecoding | CudaGraphDecoding, Tensor]:
        """Run N left-padded prompts (N, P), each to be continued `repeats` times, by at most `columns` tokens.

        Return what decodes after them, and the logits of the first tokens (B, V), B = N · `repeats`.
        """
        if not self.expands_cache:
            ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
            repeats = 1
        if self.uses_cuda_graphs:
            cache, logits = prefill(model, ids, mask, common_prefix)
            decoding = CudaGraphDecoding(model, cache, mask, repeats, columns)
        elif self.holds_prefix and common_prefix >= shared_from(model):
            prefix, cache, own_mask, logits = prefill_own(model, ids, mask, common_prefix)
            decoding = CachedDecoding(model, cache, own_mask, repeats, columns, prefix)
        else:
            cache, logits = prefill(model, ids, mask, common_prefix)
            decoding = CachedDecoding(model, cache, mask, repeats, columns)
        return decoding, logits.repeat_interleave(repeats, 0)
