"""Greedy decoding of many prompts, as an evaluation needs it: what they all begin with is run once."""

from collections.abc import Sequence

from grpo.generation.capabilities import ModelCapabilities
from grpo.generation.sampling import Completions, Generator, SamplingParams, concatenate
from grpo.model.language_model import LanguageModel
from grpo.runtime import distributed
from grpo.runtime.precision import in_precision
from grpo.scoring.tokens import common_prefix_length, left_pad

MAX_ROWS = 256  # greedy completions in one pass


def greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    max_rows: int = MAX_ROWS,
    capabilities: ModelCapabilities | None = None,
) -> Completions:
    """Return the greedy completion of each prompt, at most `max_rows` in a pass, prompts of like length together."""
    capabilities = capabilities or ModelCapabilities()
    generator, params = Generator(lm.model, capabilities), SamplingParams(max_tokens, lm.end_ids)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = []
    for start in range(0, len(order), max_rows):
        some = [prompts[i] for i in order[start : start + max_rows]]
        shared = common_prefix_length(some) if capabilities.supports_common_prefix and len(some) > 1 else 0
        with in_precision(lm.model):
            parts.append(generator(*left_pad(some, lm.pad_id, lm.device), params, common_prefix=shared))
    return concatenate(parts).pick(sorted(range(len(order)), key=order.__getitem__))


def greedy_across_ranks(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    max_rows: int = MAX_ROWS,
    capabilities: ModelCapabilities | None = None,
) -> Completions:
    """Return what `greedy` returns; the ranks share the prompts out, and all get all completions."""
    padded = distributed.pad_to_world_size(prompts)
    local = greedy(lm, padded[distributed.local_slice(len(padded))], max_tokens, max_rows, capabilities)
    if distributed.world_size() == 1:
        return local
    return concatenate(distributed.gather(local.to("cpu"))).pick(range(len(prompts)))
