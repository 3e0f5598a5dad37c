"""The forward passes of decoding: first over the prompts, then over one token of each row, with a cache.

`Decoder` holds which shortcuts to use; `probe.py` finds out which of them a model supports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grpo.generation.cuda_graphs import CudaGraphDecoding
from grpo.runtime.device import TRAITS
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.shortcuts import UnsupportedError
from grpo.scoring.attention.common_prefix import CommonPrefix
from grpo.scoring.attention.packed import enable
from grpo.scoring.tokens import common_prefix_length, last_columns, position_ids, shared_from

CAPACITY_STEP = 32  # When the cache is full, it grows by this many tokens.


def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, common_prefix: int = 0) -> tuple[DynamicCache, Tensor]:
    """Return the cache of N left-padded prompts (N, P), and the logits (N, V) after them.

    The first `common_prefix` tokens, the same in all prompts, run once. In float32 this only changes rounding.
    Layers with a sliding window keep all tokens, so that new tokens can be appended in place as in other layers.
    """
    cache = prefix_cache(model, ids, mask, common_prefix) if common_prefix else DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    out = model(
        input_ids=ids[:, common_prefix:],
        attention_mask=mask.long(),
        position_ids=position_ids(mask)[:, common_prefix:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_columns(ids[:, common_prefix:], 1),
    )
    return cache, out.logits[:, -1]


def prefix_cache(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> DynamicCache:
    """Return the cache of the first `length` columns of left-padded prompts that begin with the same tokens."""
    cache = prefill_prefix(model, ids, mask, length)
    padding = (~mask).sum(-1, keepdim=True)
    source = (torch.arange(length, device=ids.device) - padding).clamp(min=0)  # (N, S); 0 for masked padding
    for layer in cache.layers:
        layer.keys = layer.keys[0][:, source].transpose(0, 1)
        layer.values = layer.values[0][:, source].transpose(0, 1)
    return cache


def prefill_prefix(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int) -> DynamicCache:
    """Return a cache of one row with the `length` tokens that all left-padded prompts (N, P) begin with.

    Raises UnsupportedError if the model's layers hold states instead of keys and values.
    """
    cache = DynamicCache()
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise UnsupportedError("layers of this model hold states, not keys and values")
    prefix = ids[0, mask[0]][None, :length]  # (1, S)
    model(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        position_ids=torch.arange(length, device=ids.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UnsupportedError("this kind of cache does not hold plain keys and values")
    return cache


class PreallocatedLayer(DynamicLayer):
    """A cache layer with spare capacity, so that tokens are appended without copying the layer."""

    def __init__(self, layer: DynamicLayer, repeats: int) -> None:
        """Copy a layer of N rows, (N, heads, length, size), each row `repeats` times."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.is_compileable |= TRAITS[layer.device.type].is_queued  # else the host waits to read the mask
        self._length = layer.keys.shape[-2]
        self._buffers = [reserve(layer.keys, repeats), reserve(layer.values, repeats)]
        self._update_views()

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return the keys and values of all tokens."""
        start = self._length
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = [reserve(x, 1, end - start) for x in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._length = end
        self._update_views()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep only these rows, moved to the start of the same memory. Every kind of cache layer has this method."""
        for x in self._buffers:
            x[: len(beam_idx), :, : self._length] = x[:, :, : self._length][beam_idx]
        self._buffers = [x[: len(beam_idx)] for x in self._buffers]
        self._update_views()

    def _update_views(self) -> None:
        self.keys, self.values = (x[:, :, : self._length] for x in self._buffers)


def reserve(x: Tensor, repeats: int, more: int = 0) -> Tensor:
    """Copy each row of (N, heads, length, size) `repeats` times; reserve max(CAPACITY_STEP, `more`) more tokens."""
    n, heads, length, size = x.shape
    buffer = x.new_empty(n, repeats, heads, length + max(CAPACITY_STEP, more), size)
    buffer[..., :length, :] = x[:, None]
    return buffer.flatten(0, 1)


class CachedDecoding:
    """The forward passes after the prompts. Each takes one token of every row (B,) and returns logits (B, V)."""

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
        """Continue N prompts with this cache and mask (N, P), each `repeats` times, by at most `columns` tokens.

        With `prefix`, which all rows share, cache and mask hold only the tokens after the prefix.
        """
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[i] = PreallocatedLayer(layer, repeats)
            elif repeats > 1:  # another kind of layer, which has its own method to repeat rows
                layer.reorder_cache(torch.arange(len(mask), device=mask.device).repeat_interleave(repeats))
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model, self.cache, self.prefix = model, cache, prefix
        self.width = mask.shape[1]
        self.position = mask.sum(-1, keepdim=True) + (prefix.length if prefix else 0)  # (B, 1), the next position
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to each row; return the logits (B, V) after it."""
        self.width += 1
        mask = self.mask[:, : self.width]
        attention = {"attention_mask": mask} if self.prefix is None else self.prefix.arguments(mask[:, None] != 0)
        out = self.model(
            input_ids=tokens[:, None],
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **attention,
        )
        self.position = self.position + 1
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.position = self.position[rows]


def begin_after_prefix(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, columns: int, length: int
) -> tuple[CachedDecoding, Tensor]:
    """Run N left-padded prompts as `Decoder.begin` does, but hold the first `length` tokens, equal in all, only once.

    Raises UnsupportedError as `prefill_prefix` does.
    """
    enable(model)
    layers = prefill_prefix(model, ids, mask, length).layers
    prefix = CommonPrefix([layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])
    cache = DynamicCache()
    positions = position_ids(mask)
    mask = (mask & (positions >= length))[:, length:]  # left padding moves tokens of the prefix into these columns
    causal = torch.ones(2 * mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
    out = model(
        input_ids=ids[:, length:],
        position_ids=positions[:, length:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_columns(ids[:, length:], 1),
        **prefix.arguments(mask[:, None] & causal),
    )
    decoding = CachedDecoding(model, cache, mask, repeats, columns, prefix)
    return decoding, out.logits[:, -1].repeat_interleave(repeats, 0)


Decoding = CachedDecoding | CudaGraphDecoding


@dataclass(frozen=True)
class Decoder:
    """How to decode with a model: which shortcuts to use. Without shortcuts, decoding works with every model."""

    expands_cache: bool = False  # run each prompt once, and copy its cache for each completion of its group
    shares_prefix: bool = False  # run the common beginning of the prompts once
    holds_prefix: bool = False  # hold the keys and values of the common beginning once for all rows
    uses_cuda_graphs: bool = False
    ranks: Ranks = ONE  # the processes of a sharded model, which run every pass together

    def common_prefix(self, prompts: Sequence[Sequence[int]], least: int = 1) -> int:
        """Return how many tokens at the beginning of all prompts to run once; 0 if there are fewer than `least`."""
        common = common_prefix_length(prompts) if self.shares_prefix else 0
        common = min(self.ranks.gather(common))  # the processes of a sharded model must run the same passes
        return common if common >= least else 0

    def begin(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, columns: int, common_prefix: int = 0
    ) -> tuple[Decoding, Tensor]:
        """Run N left-padded prompts (N, P); return a decoding that continues them, and the logits after them (B, V).

        Each prompt is continued `repeats` times, by at most `columns` tokens: B = N · `repeats`.
        """
        if not self.expands_cache:
            ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
            repeats = 1
        pays = len(ids) * repeats * common_prefix >= TRAITS[ids.device.type].copied_tokens
        if self.holds_prefix and pays and not self.uses_cuda_graphs and common_prefix >= shared_from(model):
            return begin_after_prefix(model, ids, mask, repeats, columns, common_prefix)
        cache, logits = prefill(model, ids, mask, common_prefix)
        decoding = CudaGraphDecoding if self.uses_cuda_graphs else CachedDecoding
        return decoding(model, cache, mask, repeats, columns), logits.repeat_interleave(repeats, 0)
