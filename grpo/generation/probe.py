"""Find out which shortcuts a model supports: try each once on prompts of the task, and compare it with plain passes.

For example, models with state-space layers or an unusual kind of attention do not support all shortcuts. A model that
decodes a batch of rows differently from each row alone is refused.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo.generation.cuda_graphs import WARM_UP_TOKENS, CudaGraphDecoding
from grpo.generation.decoding import CachedDecoding, Decoder, begin_after_prefix, prefill
from grpo.model.language_model import LanguageModel
from grpo.runtime.console import printable, say
from grpo.runtime.device import TRAITS
from grpo.runtime.precision import in_precision, precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import is_sharded
from grpo.runtime.shortcuts import FLOAT32, FOUR_BITS, SIXTEEN_BITS, Tolerance, is_unsupported, reason_of, why_refused
from grpo.scoring import output_layer
from grpo.scoring.attention.packed import disable, enable
from grpo.scoring.scorer import DENSE, Scorer, fused_scores
from grpo.scoring.tokens import Tokens, common_prefix_length, left_pad, shared_from
from tasks.base import Task, prompt_of

PROBED_PROMPTS = 4
PROBED_GROUP = 2  # completions per prompt
PROBED_TOKENS = 8  # tokens per completion
BATCH_ROWS = 3  # rows of different lengths, decoded together and alone
# Largest difference in nats. In float32, linear attention rounds by up to 2e-3; wrong results differ by 0.04 or more.
BATCH_TOLERANCE = Tolerance(largest=0.01)
GRAPH_TOKENS = WARM_UP_TOKENS + 4  # After the warm-up the graph is recorded once and replayed four times.
# Largest difference of a log-probability in nats. In float32, graph and plain passes agree within 1e-6.
GRAPH_TOLERANCE = {torch.float32: 1e-3}
GRAPH_TOLERANCE_16_BITS = 0.25  # larger, because a logit in bfloat16 has only 8 significant bits

HELD_OFTEN = "In sampling, the common beginning of the prompts is held for each completion"


def probe(lm: LanguageModel, task: Task, cuda_graphs: bool = False, ranks: Ranks = ONE) -> tuple[Scorer, Decoder]:
    """Try a model on prompts of validation problems; return the fastest scorer and decoder that it supports.

    With `cuda_graphs`, CUDA graphs are tried too. `ranks` are the processes of the run.
    """
    problems = task.held_out("validation", PROBED_PROMPTS)
    prompts = lm.prompts([prompt_of(task, problem) for problem in problems])
    ids, mask = left_pad(prompts, lm.pad_id, lm.model.device)
    scorer = probe_scorer(lm.model, ids, mask)
    packs = scorer.shares_prompts
    # Rows of 4-bit layers, and of layers in 16 bits, round differently in a batch.
    if not packs and not hasattr(lm.model.config, "quantization_config") and tolerance_of(lm.model) == FLOAT32:
        check_batches(lm.model, prompts[0], lm.pad_id)
    decoder = Decoder(
        expands_cache=supports_cache_expansion(lm.model, ids, mask),
        shares_prefix=supports_common_prefix(lm.model, prompts, lm.pad_id),
        holds_prefix=packs and supports_prefix_attention(lm.model, ids, mask, common_prefix_length(prompts)),
        uses_cuda_graphs=cuda_graphs and supports_cuda_graphs(lm.model, ids, mask),
        ranks=ranks if is_sharded(lm.model) else ONE,
    )
    return scorer, decoder


def tolerance_of(model: PreTrainedModel) -> Tolerance:
    """Return how far a shortcut's log-probabilities may be from those of plain passes.

    A probe runs in float32, except in sharded models, which cast their shards themselves, and in 4-bit layers.
    """
    if is_sharded(model) and precision(model) != "float32":
        return SIXTEEN_BITS
    quantization = getattr(model.config, "quantization_config", None)
    computes_in_float32 = getattr(quantization, "bnb_4bit_compute_dtype", torch.float32) == torch.float32
    return FLOAT32 if computes_in_float32 else FOUR_BITS


def _is_supported(model: PreTrainedModel, shortcut: Callable[[], Tensor], expected: Tensor, without: str) -> bool:
    """Return whether `shortcut()` agrees with `expected`. If not, print what the run does without it, and why.

    Nothing is printed if `without` is "".
    """
    reason = why_refused(shortcut, expected, tolerance_of(model))
    if reason and without:
        say(printable(f"{without}: {reason}"))
    return not reason


@torch.no_grad()
def probe_scorer(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> Scorer:
    """Return the fastest scorer that gives the same log-probabilities as a scorer that runs every row in full."""
    completion_ids = prompt_ids[:, -PROBED_TOKENS:].repeat_interleave(PROBED_GROUP, 0)  # arbitrary tokens
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    expected = DENSE.logprobs(model, tokens, 1.0)

    def packed() -> Tensor:
        enable(model)
        return Scorer(shares_prompts=True).logprobs(model, tokens, 1.0)

    if not _is_supported(model, packed, expected, "In updates, prompts are computed for each of their completions"):
        disable(model)
        return DENSE
    # A model that changes its logits after the output layer, by a softcap for example, cannot fuse it.
    fuses = output_layer.is_plain(model) and _is_supported(
        model,
        lambda: fused_scores(model, tokens, 1.0)[0],
        expected,
        "The model changes its logits after the output layer, so updates hold those of all tokens in memory",
    )
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
    if reason := why_refused(together, expected, BATCH_TOLERANCE):
        kind = model.config.model_type
        raise ValueError(f"a {kind} model answers differently in a batch than alone ({reason}): take another --model")


@torch.no_grad()
def supports_cache_expansion(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether copying a prompt's cache for its group agrees with running the prompt for each row."""
    tokens, expected = _decoded_plainly(model, ids, mask)
    expanding = Decoder(expands_cache=True)
    return _is_supported(
        model,
        lambda: _next_logprobs(expanding.begin(model, ids, mask, PROBED_GROUP, 1)[0], tokens),
        expected,
        "In sampling, prompts are computed for each of their completions",
    )


@torch.no_grad()
def supports_common_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Return whether running the common beginning of the prompts once agrees with running it in each prompt."""
    ids, mask = left_pad(prompts, pad_id, model.device)
    common = common_prefix_length(prompts)
    expected = prefill(model, ids, mask)[1].float().log_softmax(-1)
    return _is_supported(
        model,
        lambda: prefill(model, ids, mask, common)[1].float().log_softmax(-1),
        expected,
        "The common beginning of the prompts is computed for each prompt",
    )


@torch.no_grad()
def supports_prefix_attention(model: PreTrainedModel, ids: Tensor, mask: Tensor, common_prefix: int) -> bool:
    """Return whether decoding agrees with plain passes if the common beginning of the prompts is held once.

    The model must support packed rows.
    """
    if not common_prefix:
        return False
    tokens, expected = _decoded_plainly(model, ids, mask)
    return _is_supported(
        model,
        lambda: _next_logprobs(begin_after_prefix(model, ids, mask, PROBED_GROUP, 1, common_prefix)[0], tokens),
        expected,
        # Rollouts do not use this shortcut for a shorter beginning, so there is nothing to tell.
        HELD_OFTEN if common_prefix >= shared_from(model) else "",
    )


@torch.no_grad()
def supports_cuda_graphs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Return whether decoding with a CUDA graph agrees with plain passes. If not, print why."""
    if not TRAITS[ids.device.type].has_graphs:
        reason = "they need CUDA"
    elif is_sharded(model):
        reason = "a graph cannot record the communication of a sharded model"
    else:
        with in_precision(model):
            cache, logits = prefill(model, ids, mask)
            logits = logits.repeat_interleave(PROBED_GROUP, 0)
            reason = why_graph_refused(model, cache, mask, PROBED_GROUP, logits)
    if reason:
        say(printable(f"CUDA graphs are not used: {reason}"))
    return not reason


def why_graph_refused(model: PreTrainedModel, cache: DynamicCache, mask: Tensor, repeats: int, logits: Tensor) -> str:
    """Return why a graph cannot be used; "" if graph and plain passes decode alike, greedily from `logits` (B, V).

    `cache` is not changed.
    """
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "they do not work with the kind of cache that this model has"
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
        return reason_of(error)
    largest = torch.stack(differences).max().item()
    tolerance = GRAPH_TOLERANCE.get(logits.dtype, GRAPH_TOLERANCE_16_BITS)
    return "" if largest < tolerance else f"log-probabilities differ by {largest:.2g} nats (allowed: {tolerance})"


def _decoded_plainly(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely token (B,) after each prompt, without shortcuts, and the log-probabilities after it."""
    decoding, logits = Decoder().begin(model, ids, mask, PROBED_GROUP, 1)
    tokens = logits.argmax(-1)
    return tokens, _next_logprobs(decoding, tokens)


def _next_logprobs(decoding: CachedDecoding, tokens: Tensor) -> Tensor:
    """Append a token (B,) to each row; return the log-probabilities (B, V) after it."""
    return decoding(tokens).float().log_softmax(-1)
