"""Greedy decoding of many prompts, as an evaluation needs it."""

from collections.abc import Sequence

from grpo.generation.decoding import Decoder
from grpo.generation.sampling import Completions, Generator, SamplingParams, concatenate
from grpo.model.language_model import LanguageModel
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import Ranks
from grpo.scoring.tokens import left_pad

ROWS_PER_PASS = 256  # greedy completions


def greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rows_per_pass: int = ROWS_PER_PASS,
    decoder: Decoder = Decoder(),  # noqa: B008, it is frozen
) -> Completions:
    """Return the greedy completion of each prompt; prompts of similar length go through the model together."""
    generator, params = Generator(lm.model, decoder), SamplingParams(max_tokens, lm.end_ids)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = []
    for start in range(0, len(order), rows_per_pass):
        batch = [prompts[i] for i in order[start : start + rows_per_pass]]
        ids, mask = left_pad(batch, lm.pad_id, lm.device)
        with in_precision(lm.model):
            parts.append(generator(ids, mask, params, common_prefix=decoder.common_prefix(batch)))
    return concatenate(parts).pick(sorted(range(len(order)), key=order.__getitem__))


def greedy_across_ranks(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rows_per_pass: int,
    decoder: Decoder,
    ranks: Ranks,
) -> Completions:
    """Return what `greedy` returns; the ranks share the prompts out, and all get all completions."""
    padded = ranks.padded(prompts)
    local = greedy(lm, padded[ranks.own_slice(len(padded))], max_tokens, rows_per_pass, decoder)
    if ranks.size == 1:
        return local
    return concatenate(ranks.gather(local.to("cpu"))).pick(range(len(prompts)))
