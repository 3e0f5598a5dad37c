"""What a model can share: probed once on its own prompts, each shortcut against the plain way.

Models whose layers mix tokens otherwise than by attention (state-space layers), or whose attention is not the plain
one, do not support some of the shortcuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.generation.decoding import CachedDecoder, graph_matches_cached, prefill, prefill_own
from grpo.model.language_model import LanguageModel
from grpo.runtime.console import say
from grpo.runtime.microbatch import matches_reference
from grpo.runtime.precision import in_precision
from grpo.scoring.attention.packed import disable
from grpo.scoring.logprobs import completion_logprobs
from grpo.scoring.tokens import Tokens, common_prefix_length, left_pad
from tasks.base import Task, prompt_of

PROBED = 4  # prompts, each with two completions
GRAPH_GROUP = 2  # completions a prompt, for the probe of CUDA graphs


@dataclass(frozen=True)
class ModelCapabilities:
    """The shortcuts that a model supports; all False is right for any model."""

    supports_packing: bool = False  # prompts and completions scored as one packed row
    supports_cache_expansion: bool = False  # the cache of a prompt copied for each completion of its group
    supports_common_prefix: bool = False  # what all prompts begin with run once
    supports_prefix_attention: bool = False  # what all prompts begin with held once in decoding
    supports_cuda_graphs: bool = False

    @classmethod
    def probe(cls, lm: LanguageModel, task: Task, cuda_graphs: bool = False) -> "ModelCapabilities":
        """Try a model on prompts of some validation problems; `cuda_graphs` tries those too."""
        problems = task.held_out("validation", PROBED)
        prompts = lm.prompts([prompt_of(task, problem) for problem in problems])
        ids, mask = left_pad(prompts, lm.pad_id, lm.device)
        packing = supports_packing(lm.model, ids, mask)
        found = cls(
            packing,
            supports_cache_expansion(lm.model, ids, mask),
            supports_common_prefix(lm.model, prompts, lm.pad_id),
            packing and supports_prefix_attention(lm.model, ids, mask, common_prefix_length(prompts)),
            cuda_graphs and supports_cuda_graphs(lm.model, ids, mask),
        )
        if cuda_graphs and not found.supports_cuda_graphs:
            say("This model or device does not support CUDA graphs: it decodes without them.")
        return found


@torch.no_grad()
def supports_packing(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> bool:
    """Return whether packed rows give this model's log-probabilities, compared with dense rows."""
    completion_ids = prompt_ids[:, -8:].repeat_interleave(2, 0)  # any tokens will do
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    dense, _ = completion_logprobs(model, tokens, 1.0, packed=False)
    same = matches_reference(lambda: completion_logprobs(model, tokens, 1.0, packed=True)[0], dense)
    if not same:
        disable(model)
    return same


@torch.no_grad()
def supports_cache_expansion(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether a prompt's cache, copied twice, continues as two runs of the prompt do."""
    separate = _after_a_token(model, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), 1)
    return matches_reference(lambda: _after_a_token(model, ids, mask, 2), separate)


@torch.no_grad()
def supports_common_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Return whether what all prompts begin with can be run once, compared with running it in each."""
    ids, mask = left_pad(prompts, pad_id, model.device)

    def logprobs(common_prefix: int) -> Tensor:
        _, logits = prefill(model, ids, mask, common_prefix)
        return logits.float().log_softmax(-1)

    return matches_reference(lambda: logprobs(common_prefix_length(prompts)), logprobs(0))


@torch.no_grad()
def supports_prefix_attention(model: PreTrainedModel, ids: Tensor, mask: Tensor, common_prefix: int) -> bool:
    """Return whether decoding gives the same where what all prompts begin with is held once; packing must work."""
    if not common_prefix:
        return False
    separate = _after_a_token(model, ids, mask, 2)
    return matches_reference(lambda: _after_a_token(model, ids, mask, 2, common_prefix), separate)


@torch.no_grad()
def supports_cuda_graphs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether a CUDA graph decodes as plain passes do; False on other devices."""
    if ids.device.type != "cuda":
        return False
    with in_precision(model):
        cache, logits = prefill(model, ids, mask)
        logits = logits.repeat_interleave(GRAPH_GROUP, 0)
        return graph_matches_cached(model, cache, mask, GRAPH_GROUP, logits)


def _after_a_token(model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, common_prefix: int = 0) -> Tensor:
    """Return log-probabilities (N · repeats, V) after the prompts and their likeliest token."""
    if common_prefix:
        prefix, cache, mask, logits = prefill_own(model, ids, mask, common_prefix)
    else:
        prefix, (cache, logits) = None, prefill(model, ids, mask)
    decoder = CachedDecoder(model, cache, mask, repeats, 1, prefix)
    return decoder(logits.argmax(-1).repeat_interleave(repeats)).float().log_softmax(-1)
