"""Decode with a CUDA graph, which is recorded once for each batch of prompts and replayed without Python.

A replay uses the same shapes and memory as the recording. So the cache is allocated for the longest possible
completion, ended rows are not dropped, and the mask hides the part of the cache that is not written yet. `probe.py`
tries CUDA graphs on a model before a run uses them. They have not been run on a GPU yet, so they are off by default.
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from grpo.runtime.device import TRAITS, is_out_of_memory
from grpo.runtime.shortcuts import UnsupportedError, reason_of

# This many tokens run on a side stream before the recording, to initialise CUDA's libraries.
WARM_UP_TOKENS = 2


class CudaGraphDecoding:
    """`CachedDecoding` with tensors of constant shape and, if the device is CUDA, with a CUDA graph."""

    can_shrink = False  # rows cannot be dropped

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, columns: int) -> None:
        """Continue N prompts with this cache and mask (N, P), each `repeats` times, by at most `columns` tokens."""
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0  # tokens decoded so far
        # Layers with a sliding window get a full cache too: the model's mask hides the tokens outside the window.
        self.cache = Cache(layers=[StaticLayer(max_cache_len=mask.shape[1] + columns) for _ in cache.layers])
        for i, (layer, static) in enumerate(zip(cache.layers, self.cache.layers, strict=True)):
            keys = layer.keys.repeat_interleave(repeats, 0)
            values = layer.values.repeat_interleave(repeats, 0)
            static.lazy_initialization(keys, values)
            self.cache.update(keys, values, i)
        self.position = mask.sum(-1, keepdim=True)  # (B, 1), position of the next token
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)
        self.tokens = torch.zeros_like(self.position)  # (B, 1)
        self.logits = torch.empty(0)  # (B, V) after the last token; each replay overwrites it

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append one token (B,) to each row; return the logits (B, V) after it, which the next call overwrites."""
        self.tokens.copy_(tokens[:, None])
        self.done += 1
        if not TRAITS[tokens.device.type].has_graphs:
            self._forward()
        elif self.done <= WARM_UP_TOKENS:
            side = torch.cuda.Stream()
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self._forward()
            main.wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                self._record()
            self.graph.replay()
        return self.logits

    def _record(self) -> None:
        """Record a pass without running it. Raises UnsupportedError if the model does what a graph cannot record."""
        try:
            with torch.cuda.graph(self.graph):
                self._forward()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedError(f"a CUDA graph cannot record a pass ({reason_of(error)})") from error

    def _forward(self) -> None:
        """Run the model on `self.tokens`; set `self.logits`."""
        out = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position.add_(1)
        self.logits = out.logits[:, -1]
