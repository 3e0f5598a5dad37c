"""Decoding by CUDA graphs: a token's forward pass is recorded once a pass, then replayed without Python.

Not yet run on a GPU. So it is off unless asked for, and even then each model is tried first, on the prompts at hand
against the plain way (`can_replay`). What a graph replays has to keep its shapes and places: the cache has room for
the longest completion, rows that have ended stay, and which keys are there yet is a matter of the mask.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from grpo.cache import Steps
from grpo.console import say
from grpo.memory import is_refusal

WARM_UP = 2  # tokens run as usual, on another stream, before one is recorded: CUDA's libraries set themselves up
TRIED = WARM_UP + 4  # tokens
SAME = {torch.float32: 1e-3}  # nats; in float32 the two ways differ by 1e-6
SAME_16_BITS = 0.25  # bfloat16 has 8 bits of a logit
_can_replay: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class StaticSteps:
    """As `Steps`, in tensors of the same shapes and places for every token; elsewhere than on CUDA not recorded."""

    can_shrink = False

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, columns: int) -> None:
        """From the cache of N prompts with their mask (N, P), each `repeats` times, for at most `columns` tokens."""
        mask = mask.long().repeat_interleave(repeats, 0)
        self.model, self.graph, self.done = model, None, 0
        # full layers for sliding windows too: the mask that the model makes has the window
        self.cache = Cache(layers=[StaticLayer(max_cache_len=mask.shape[1] + columns) for _ in cache.layers])
        for i, layer in enumerate(cache.layers):
            self.cache.update(*(x.repeat_interleave(repeats, 0) for x in (layer.keys, layer.values)), i)
        self.position = mask.sum(-1, keepdim=True)  # (B, 1), of the next token
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], columns)], 1)  # (B, P + columns)
        self.tokens = torch.zeros_like(self.position)  # (B, 1)
        self.logits = torch.empty(0)  # (B, V) after the last token; a replay writes it anew

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row (B,); valid until the next call."""
        self.tokens.copy_(tokens[:, None])
        self.done += 1
        if tokens.device.type != "cuda":
            self._forward()
        elif self.done <= WARM_UP:
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self._forward()
            main.wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # recorded, not run
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


def can_replay(model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, logits: Tensor) -> bool:
    """Whether a model decodes by CUDA graphs as it does without: tried once, on the cache of the first prompts.

    `logits` (B, V) are those after the prompts. Says so where it does not.
    """
    if model not in _can_replay:
        _can_replay[model] = logits.device.type == "cuda" and agrees(model, cache, mask, repeats, logits)
        if not _can_replay[model]:
            say("CUDA graphs cannot be had here with this model: it decodes without them.")
    return _can_replay[model]


def agrees(model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, logits: Tensor) -> bool:
    """Whether `StaticSteps` gives the log-probabilities of `Steps` for some greedy tokens; leaves the cache alone."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    twin, differences = DynamicCache(), []
    twin.layers = list(cache.layers)
    try:
        static = StaticSteps(model, cache, mask, repeats, TRIED)
        plain = Steps(model, twin, mask, repeats, TRIED)
        for _ in range(TRIED):
            tokens = logits.argmax(-1)
            logits, other = plain(tokens), static(tokens)
            differences.append((logits.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())
    except Exception as error:
        if not is_refusal(error):
            raise
        return False
    return bool(torch.stack(differences).max() < SAME.get(logits.dtype, SAME_16_BITS))
