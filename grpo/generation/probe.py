"""Which shortcuts a model supports: each is tried once on the model's own prompts, against the plain way.

Models whose layers mix tokens otherwise than by attention (state-space layers), or whose attention is not the plain
one, do not support some of the shortcuts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.generation.cuda_graphs import WARM_UP_TOKENS, CudaGraphDecoding
from grpo.generation.decoding import CachedDecoding, Decoder, prefill, prefill_own
from grpo.model.language_model import LanguageModel
from grpo.runtime.console import say
from grpo.runtime.microbatch import is_unsupported, matches_reference
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import is_sharded
from grpo.scoring import output_layer
from grpo.scoring.attention.packed import disable
from grpo.scoring.scorer import DENSE, Scorer, fused_scores
from grpo.scoring.tokens import Tokens, common_prefix_length, left_pad
from tasks.base import Task, prompt_of

PROBED_PROMPTS = 4  # each with two completions
PROBED_TOKENS = 8  # of each completion
GRAPH_GROUP = 2  # completions a prompt, for the probe of CUDA graphs
GRAPH_TOKENS = WARM_UP_TOKENS + 4
GRAPH_TOLERANCE = {torch.float32: 1e-3}  # nats; in float32 the two ways differ by 1e-6
GRAPH_TOLERANCE_16_BITS = 0.25  # nats; bfloat16 keeps 8 bits of a logit


def probe(lm: LanguageModel, task: Task, cuda_graphs: bool = False, ranks: Ranks = ONE) -> tuple[Scorer, Decoder]:
    """Try a model on the prompts of some validation problems; return how it scores and how it decodes.

    `cuda_graphs` tries those too. `ranks` are the processes of the run.
    """
    problems = task.held_out("validation", PROBED_PROMPTS)
    prompts = lm.prompts([prompt_of(task, problem) for problem in problems])
    ids, mask = left_pad(prompts, lm.pad_id, lm.device)
    scorer = probe_scorer(lm.model, ids, mask)
    shared = scorer.shares_prompts
    sharded = is_sharded(lm.model)  # its processes communicate in a pass, which a graph cannot record
    decoder = Decoder(
        expands_cache=supports_cache_expansion(lm.model, ids, mask),
        shares_prefix=supports_common_prefix(lm.model, prompts, lm.pad_id),
        holds_prefix=shared and supports_prefix_attention(lm.model, ids, mask, common_prefix_length(prompts)),
        uses_cuda_graphs=cuda_graphs and not sharded and supports_cuda_graphs(lm.model, ids, mask),
        ranks=ranks if sharded else ONE,
    )
    if cuda_graphs and not decoder.uses_cuda_graphs:
        say("This model or device does not support CUDA graphs: it decodes without them.")
    return scorer, decoder


@torch.no_grad()
def probe_scorer(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> Scorer:
    """Return the fastest scorer that gives this model's log-probabilities, compared with dense rows."""
    completion_ids = prompt_ids[:, -PROBED_TOKENS:].repeat_interleave(2, 0)  # any tokens will do
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    expected = DENSE.logprobs(model, tokens, 1.0)
    if not matches_reference(lambda: Scorer(shares_prompts=True).logprobs(model, tokens, 1.0), expected):
        disable(model)
        return DENSE
    is_plain = output_layer.is_plain(model)
    fuses = is_plain and matches_reference(lambda: fused_scores(model, tokens, 1.0)[0], expected)
    if is_plain and not fuses:  # a softcap, for instance
        say("This model changes its logits, so they are all held in memory.")
    return Scorer(shares_prompts=True, fuses_output=fuses)


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
    """Return whether decoding gives the same where what all prompts begin with is held once.

    The model must be able to share prompts in a packed row.
    """
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


def graph_matches_cached(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, logits: Tensor
) -> bool:
    """Return whether a graph and plain passes agree on greedy tokens after `logits` (B, V); `cache` is unchanged."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    twin = DynamicCache()
    twin.layers = list(cache.layers)
    differences = []
    try:
        static = CudaGraphDecoding(model, cache, mask, repeats, GRAPH_TOKENS)
        plain = CachedDecoding(model, twin, mask, repeats, GRAPH_TOKENS)
        for _ in range(GRAPH_TOKENS):
            tokens = logits.argmax(-1)
            logits, other = plain(tokens), static(tokens)
            differences.append((logits.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())
    except Exception as error:
        if not is_unsupported(error):
            raise
        return False
    return bool(torch.stack(differences).max() < GRAPH_TOLERANCE.get(logits.dtype, GRAPH_TOLERANCE_16_BITS))


def _after_a_token(model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, common_prefix: int = 0) -> Tensor:
    """Return log-probabilities (N · repeats, V) after the prompts and their likeliest token."""
    if common_prefix:
        prefix, cache, mask, logits = prefill_own(model, ids, mask, common_prefix)
    else:
        prefix, (cache, logits) = None, prefill(model, ids, mask)
    decoding = CachedDecoding(model, cache, mask, repeats, 1, prefix)
    return decoding(logits.argmax(-1).repeat_interleave(repeats)).float().log_softmax(-1)
