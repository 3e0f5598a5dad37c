"""Decoding by a CUDA graph, recorded once a batch of prompts and replayed without Python.

What a graph replays must keep its shapes and places: the cache has room for the longest completion, rows that have
ended stay, and the mask alone tells which keys exist. CUDA graphs have not been run on a GPU yet, so they are off by
default, and tried on each model first (`probe.py`).
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

WARM_UP_TOKENS = 2  # run on a side stream before one is recorded, as CUDA's libraries need to initialise


class CudaGraphDecoding:
    """`CachedDecoding` in tensors of constant shape and place, recorded as a CUDA graph; plain passes elsewhere."""

    can_shrink = False

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, columns: int) -> None:
        """Start from the cache of N prompts with mask (N, P), each `repeats` times, for at most `columns` tokens."""
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0  # tokens
        # full layers for sliding windows too: the mask that the model builds has the window
        self.cache = Cache(layers=[StaticLayer(max_cache_len=mask.shape[1] + columns) for _ in cache.layers])
        for i, (layer, static) in enumerate(zip(cache.layers, self.cache.layers, strict=True)):
            keys, values = (x.repeat_interleave(repeats, 0) for x in (layer.keys, layer.values))
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
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self._forward()
            main.wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # records, does not run
                    self._forward()
            self.graph.replay()
        return self.logits

    def _forward(self) -> None:
        out = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position.add_(1)
        self.logits = out.logits[:, -1]
