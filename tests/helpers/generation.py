"""Generate completions in one call."""

import torch

from grpo.generation.decoding import Decoder
from grpo.generation.greedy import ROWS_PER_PASS, greedy
from grpo.generation.sampling import Generator, SamplingParams

EXPANDING = Decoder(expands_cache=True)


def generate(
    model,
    tokens,
    uniforms=None,
    *,
    limit=8,
    temperature=1.0,
    ends=(1, 5),
    group=4,
    decoder=EXPANDING,
    check_every=0,
    rows=None,
):
    """Return completions of the prompts of `tokens`, `group` of each; greedy without `uniforms`."""
    generator, params = Generator(model, decoder, check_every), SamplingParams(limit, ends, group, temperature)
    return generator(tokens.prompt_ids, tokens.prompt_mask, params, uniforms, rows)


def same_completions(one, other):
    """Return whether two results have the same tokens, lengths and ends."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "lengths", "ended"))


def greedy_texts(lm, chats, limit, rows=ROWS_PER_PASS):
    """Return the greedy completion of each chat as text."""
    return lm.decode(greedy(lm, lm.prompts(chats), limit, rows).rows(with_end=False))
