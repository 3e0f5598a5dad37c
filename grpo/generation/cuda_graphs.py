"""Decoding by a CUDA graph, which is recorded once for each batch of prompts and replayed without Python.

A replay uses the same shapes and memory as the recording: the cache has room for the longest completion, rows that
have ended stay, and the mask alone tells which keys exist. `probe.py` tries CUDA graphs on a model before a run uses
them. They have not been run on a GPU yet, so they are off by default.
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

WARM_UP_TOKENS = 2  # run on a side stream before the recording, so that CUDA's libraries are initialised


class CudaGraphDecoding:
    """`CachedDecoding` with tensors of constant shape and memory, as a CUDA graph; plain passes on other devices."""

    can_shrink = False  # rows cannot be dropped

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, columns: int) -> None:
        """Start from the cache of N prompts with mask (N, P), each `repeats` times, for at most `columns` tokens."""
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0  # tokens decoded so far
        # Layers with a sliding window are full too: the mask that the model builds hides what is outside.
        self.cache = Cache(layers=[StaticLayer(max_cache_len=mask.shape[1] + columns) for _ in cache.layers])
        for i, (layer, static) in enumerate(zip(cache.layers, self.cache.layers, strict=True)):
            keys = layer.keys.repeat_interleave(repeats, 0)
            values = layer.values.repeat_interleave(repeats, 0)
            static.lazy_initialization(keys, values)
            self.cache.update(keys, values, i)
        self.position = mask.sum(-1, keepdim=True)  # (B, 1), of the next token
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)
        self.tokens = torch.zeros_like(self.position)  # (B, 1)
        self.logits = torch.empty(0)  # (B, V) after the last token; each replay overwrites it

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token of each row (B,); valid until the next call."""
        self.tokens.copy_(tokens[:, None])
        self.done += 1
        if tokens.device.type != "cuda":
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
                with torch.cuda.graph(self.graph):  # this records the pass without running it
                    self._forward()
            self.graph.replay()
        return self.logits

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
