"""Greedy decoding of many prompts, for evaluations."""

from collections.abc import Sequence

from grpo.generation.decoding import Decoder
from grpo.generation.sampling import Completions, Generator, SamplingParams, concatenate
from grpo.model.language_model import LanguageModel
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.scoring.tokens import left_pad

ROWS_PER_PASS = 256  # At most this many completions are decoded together.


def greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rows_per_pass: int = ROWS_PER_PASS,
    decoder: Decoder = Decoder(),  # noqa: B008, a decoder is immutable
    ranks: Ranks = ONE,
) -> Completions:
    """Return the greedy completion of each prompt. Prompts of similar length run together.

    Each rank decodes its share of the prompts. All ranks get all completions.
    """
    generator = Generator(lm.model, decoder)
    params = SamplingParams(max_tokens, lm.end_ids)
    padded = ranks.padded(prompts)
    local = padded[ranks.own_slice(len(padded))]
    order = sorted(range(len(local)), key=lambda i: len(local[i]))
    parts = []
    for start in range(0, len(order), rows_per_pass):
        batch = [local[i] for i in order[start : start + rows_per_pass]]
        ids, mask = left_pad(batch, lm.pad_id, lm.model.device)
        with in_precision(lm.model):
            parts.append(generator(ids, mask, params, common_prefix=decoder.common_prefix(batch)))
    completions = concatenate(parts).pick(sorted(range(len(order)), key=order.__getitem__))
    if ranks.size == 1:
        return completions
    return concatenate(ranks.gather(completions)).pick(range(len(prompts)))
