"""One token a row and forward pass, over a key/value cache that is written in place."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens; memory for so many is taken at a time


class RoomyLayer(DynamicLayer):
    """A layer's cache with room for the next tokens: `DynamicLayer` copies all of it for every token."""

    def __init__(self, layer: DynamicLayer, repeats: int) -> None:
        """What a layer holds of N rows, (N, heads, length, size), `repeats` times each."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        if layer.device.type != "cpu":  # or transformers reads each mask, to do without one where nothing is masked
            self.is_compileable = True
        self._length = layer.keys.shape[-2]
        self._held = tuple(with_room(x, repeats) for x in (layer.keys, layer.values))
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **more: object
    ) -> tuple[Tensor, Tensor]:
        """Add some tokens; returns the keys and values of all."""
        start, end = self._length, self._length + key_states.shape[-2]
        if end > self._held[0].shape[-2]:
            self._held = tuple(with_room(x, 1, end - start) for x in (self.keys, self.values))
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self._length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._held = tuple(x[indices] for x in self._held)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (x[:, :, : self._length] for x in self._held)


def with_room(x: Tensor, repeats: int, more: int = 0) -> Tensor:
    """A copy of (N, heads, length, size) with each row `repeats` times and room for ROOM tokens, or `more`."""
    n, heads, length, size = x.shape
    held = x.new_empty(n, repeats, heads, length + max(ROOM, more), size)
    held[..., :length, :] = x[:, None]
    return held.flatten(0, 1)


class Steps:
    """The forward passes after the prompts: each takes a token of every row (B,) to the logits after it (B, V)."""

    can_shrink = True  # rows can leave

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, columns: int) -> None:
        """From the cache of N prompts with their mask (N, P), each `repeats` times, for at most `columns` tokens."""
        # a layer of another kind is the model's own; it knows how to be repeated itself
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = RoomyLayer(layer, repeats)
            elif repeats > 1:
                layer.batch_repeat_interleave(repeats)
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model, self.cache, self.width = model, cache, mask.shape[1]
        self.position = mask.sum(-1, keepdim=True)  # (B, 1), of the next token
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row (B,)."""
        self.width += 1
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask[:, : self.width],
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position = self.position + 1
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]
