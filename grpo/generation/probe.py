"""Find out which shortcuts a model supports: try each once on prompts of the task, and compare it with plain passes.

For example, models with state-space layers or an unusual kind of attention do not support all shortcuts. A model that
decodes a batch of rows differently from each row alone is refused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.generation.cuda_graphs import WARM_UP_TOKENS, CudaGraphDecoding
from grpo.generation.decoding import CachedDecoding, Decoder, begin_after_prefix, prefill
from grpo.model.language_model import LanguageModel
from grpo.runtime.console import say
from grpo.runtime.device import TRAITS
from grpo.runtime.microbatch import is_unsupported, matches_reference
from grpo.runtime.precision import in_precision, precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import is_sharded
from grpo.scoring import output_layer
from grpo.scoring.attention.packed import disable, enable
from grpo.scoring.scorer import DENSE, Scorer, fused_scores
from grpo.scoring.tokens import Tokens, common_prefix_length, left_pad
from tasks.base import Task, prompt_of

PROBED_PROMPTS = 4
PROBED_GROUP = 2  # completions per prompt
PROBED_TOKENS = 8  # tokens per completion
BATCH_ROWS = 3  # rows of different lengths, decoded together and alone
# Largest difference in nats. In float32, linear attention rounds by up to 2e-3; wrong results differ by 0.04 or more.
BATCH_TOLERANCE = 0.01
GRAPH_TOKENS = WARM_UP_TOKENS + 4  # After the warm-up the graph is recorded once and replayed four times.
# Largest difference of a log-probability in nats. In float32, graph and plain passes agree within 1e-6.
GRAPH_TOLERANCE = {torch.float32: 1e-3}
GRAPH_TOLERANCE_16_BITS = 0.25  # larger, because a logit in bfloat16 has only 8 significant bits


def probe(lm: LanguageModel, task: Task, cuda_graphs: bool = False, ranks: Ranks = ONE) -> tuple[Scorer, Decoder]:
    """Try a model on prompts of validation problems; return the fastest scorer and decoder that it supports.

    With `cuda_graphs`, CUDA graphs are tried too. `ranks` are the processes of the run.
    """
    problems = task.held_out("validation", PROBED_PROMPTS)
    prompts = lm.prompts([prompt_of(task, problem) for problem in problems])
    ids, mask = left_pad(prompts, lm.pad_id, lm.model.device)
    scorer = probe_scorer(lm.model, ids, mask)
    packs = scorer.shares_prompts
    sharded = is_sharded(lm.model)  # a graph cannot record the communication in a sharded model's passes
    # Rows round differently in a batch if layers are in 4 bits, or if a sharded model computes in bfloat16.
    rounds = hasattr(lm.model.config, "quantization_config") or (sharded and precision(lm.model) != "float32")
    if not packs and not rounds:
        check_batches(lm.model, prompts[0], lm.pad_id)
    decoder = Decoder(
        expands_cache=supports_cache_expansion(lm.model, ids, mask),
        shares_prefix=supports_common_prefix(lm.model, prompts, lm.pad_id),
        holds_prefix=packs and supports_prefix_attention(lm.model, ids, mask, common_prefix_length(prompts)),
        uses_cuda_graphs=cuda_graphs and not sharded and supports_cuda_graphs(lm.model, ids, mask),
        ranks=ranks if sharded else ONE,
    )
    if cuda_graphs and not decoder.uses_cuda_graphs:
        say("This model or device does not support CUDA graphs, so --cuda-graphs has no effect.")
    return scorer, decoder


@torch.no_grad()
def probe_scorer(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> Scorer:
    """Return the fastest scorer that gives the same log-probabilities as a scorer that runs every row in full."""
    completion_ids = prompt_ids[:, -PROBED_TOKENS:].repeat_interleave(PROBED_GROUP, 0)  # arbitrary tokens
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    expected = DENSE.logprobs(model, tokens, 1.0)

    def packed() -> Tensor:
        enable(model)
        return Scorer(shares_prompts=True).logprobs(model, tokens, 1.0)

    if not matches_reference(packed, expected):
        disable(model)
        return DENSE
    is_plain = output_layer.is_plain(model)
    fuses = is_plain and matches_reference(lambda: fused_scores(model, tokens, 1.0)[0], expected)
    if is_plain and not fuses:
        # The model may have a softcap, for example.
        say("This model changes its logits after the output layer, so the logits of all tokens are held in memory.")
    return Scorer(shares_prompts=True, fuses_output=fuses)


@torch.no_grad()
def check_batches(model: PreTrainedModel, prompt: Sequence[int], pad_id: int) -> None:
    """Raise ValueError unless decoding padded rows, one of which is dropped, agrees with running each row in full.

    A model with states instead of keys and values could take padding for tokens, or keep the states of dropped rows.
    """
    ids, mask = left_pad([prompt[start:] for start in range(BATCH_ROWS)], pad_id, model.device)

    def together() -> Tensor:
        decoding, _ = Decoder().begin(model, ids, mask, 1, 2)
        decoding(ids[:, -1])
        decoding.keep(torch.arange(1, BATCH_ROWS, device=ids.device))
        return decoding(ids[1:, -1]).float().log_softmax(-1)

    def alone(row: int) -> Tensor:
        tokens = torch.cat([ids[row, row:], ids[row, -1:], ids[row, -1:]])[None]
        return model(input_ids=tokens, use_cache=False).logits[:, -1].float().log_softmax(-1)

    expected = torch.cat([alone(row) for row in range(1, BATCH_ROWS)])
    if not matches_reference(together, expected, BATCH_TOLERANCE):
        kind = model.config.model_type
        raise ValueError(f"a {kind} model answers differently in a batch than alone: take another --model")


@torch.no_grad()
def supports_cache_expansion(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether copying a prompt's cache for its group agrees with running the prompt for each row."""
    expected = _next_logprobs(*Decoder().begin(model, ids, mask, PROBED_GROUP, 1))
    expanding = Decoder(expands_cache=True)
    return matches_reference(lambda: _next_logprobs(*expanding.begin(model, ids, mask, PROBED_GROUP, 1)), expected)


@torch.no_grad()
def supports_common_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Return whether running the common beginning of the prompts once agrees with running it in each prompt."""
    ids, mask = left_pad(prompts, pad_id, model.device)
    common = common_prefix_length(prompts)
    expected = prefill(model, ids, mask)[1].log_softmax(-1)
    return matches_reference(lambda: prefill(model, ids, mask, common)[1].log_softmax(-1), expected)


@torch.no_grad()
def supports_prefix_attention(model: PreTrainedModel, ids: Tensor, mask: Tensor, common_prefix: int) -> bool:
    """Return whether decoding agrees with plain passes if the common beginning of the prompts is held once.

    The model must support packed rows.
    """
    if not common_prefix:
        return False
    expected = _next_logprobs(*Decoder().begin(model, ids, mask, PROBED_GROUP, 1))
    return matches_reference(
        lambda: _next_logprobs(*begin_after_prefix(model, ids, mask, PROBED_GROUP, 1, common_prefix)), expected
    )


@torch.no_grad()
def supports_cuda_graphs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether decoding with a CUDA graph agrees with plain passes; False if the device is not CUDA."""
    if not TRAITS[ids.device.type].has_graphs:
        return False
    with in_precision(model):
        cache, logits = prefill(model, ids, mask)
        logits = logits.repeat_interleave(PROBED_GROUP, 0)
        return graph_matches_cached(model, cache, mask, PROBED_GROUP, logits)


def graph_matches_cached(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, logits: Tensor
) -> bool:
    """Return whether a graph and plain passes decode alike, greedily from `logits` (B, V); `cache` is not changed."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    copy = DynamicCache()
    copy.layers = list(cache.layers)
    differences = []
    try:
        graph = CudaGraphDecoding(model, cache, mask, repeats, GRAPH_TOKENS)
        plain = CachedDecoding(model, copy, mask, repeats, GRAPH_TOKENS)
        for _ in range(GRAPH_TOKENS):
            tokens = logits.argmax(-1)
            logits = plain(tokens)
            difference = logits.float().log_softmax(-1) - graph(tokens).float().log_softmax(-1)
            differences.append(difference.abs().max())
    except Exception as error:
        if not is_unsupported(error):
            raise
        return False
    return bool(torch.stack(differences).max() < GRAPH_TOLERANCE.get(logits.dtype, GRAPH_TOLERANCE_16_BITS))


def _next_logprobs(decoding: CachedDecoding, logits: Tensor) -> Tensor:
    """Decode the most likely token of `logits` (B, V); return the log-probabilities (B, V) after it."""
    return decoding(logits.argmax(-1)).float().log_softmax(-1)
