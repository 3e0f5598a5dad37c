"""Generate completions in one call."""

import torch

from grpo.generation.greedy import MAX_ROWS, greedy
from grpo.generation.probe import ModelCapabilities
from grpo.generation.sampling import Generator, SamplingParams

EXPANDING = ModelCapabilities(supports_cache_expansion=True)


def generate(
    model,
    tokens,
    uniforms=None,
    *,
    limit=8,
    temperature=1.0,
    ends=(1, 5),
    group=4,
    capabilities=EXPANDING,
    check_every=0,
    max_rows=None,
):
    """Return completions of the prompts of `tokens`, `group` of each; greedy without `uniforms`."""
    generator, params = Generator(model, capabilities, check_every), SamplingParams(limit, ends, group, temperature)
    return generator(tokens.prompt_ids, tokens.prompt_mask, params, uniforms, max_rows)


def same_completions(one, other):
    """Return whether two results have the same tokens, lengths and ends."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "lengths", "ended"))


def greedy_texts(lm, chats, limit, max_rows=MAX_ROWS):
    """Return the greedy completion of each chat as text."""
    return lm.decode(greedy(lm, lm.prompts(chats), limit, max_rows).rows(with_end=False))
