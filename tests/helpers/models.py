"""Tiny random models and ragged batches, on the CPU, in milliseconds."""

import torch
from transformers import PreTrainedModel

from grpo.scoring.tokens import Tokens
from tests.helpers import zoo

VOCABULARY = 50


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a kind of the zoo, in eval mode, with a vocabulary of 50."""
    return zoo.random_model(kind, seed, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=2)


def ragged_tokens(
    prompt_lengths: tuple[int, ...] = (7, 4, 9),
    num_generations: int = 3,
    columns: int = 6,
    seed: int = 0,
    extra_padding: int = 0,
    common_prefix: int = 0,
) -> Tokens:
    """Return random prompts of these lengths, left-padded, and completions of random lengths from 1 to `columns`.

    All prompts begin with the same `common_prefix` tokens, and no others.
    """
    generator = torch.Generator().manual_seed(seed)
    width, n = max(prompt_lengths) + extra_padding, len(prompt_lengths)
    prompt_ids = torch.zeros(n, width, dtype=torch.long)
    prompt_mask = torch.zeros(n, width, dtype=torch.bool)
    for row, length in enumerate(prompt_lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        if common_prefix:
            ids[:common_prefix], ids[common_prefix] = torch.arange(3, 3 + common_prefix), 3 + row
        prompt_ids[row, width - length :] = ids
        prompt_mask[row, width - length :] = True
    rows = n * num_generations
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    mask = torch.arange(columns) < lengths[:, None]
    completion_ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator) * mask
    return Tokens(prompt_ids, prompt_mask, completion_ids, mask)
