"""What the tests share: tiny random models and ragged batches, on the CPU, offline, in milliseconds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo.logprobs import Tokens

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    # large enough that the logits are not all alike: a test on a uniform softmax could hide anything
    "initializer_range": 0.3,
}


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a shape, in eval mode: "qwen2", "llama" or "gemma3" (window 6)."""
    torch.manual_seed(seed)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, sliding_window_pattern=2)
        assert "sliding_attention" in config.layer_types
        assert "full_attention" in config.layer_types
        model = Gemma3ForCausalLM(config)
    return model.eval()


def ragged_tokens(
    prompt_lengths: tuple[int, ...] = (7, 4, 9),
    num_generations: int = 3,
    columns: int = 6,
    seed: int = 0,
    extra_padding: int = 0,
) -> Tokens:
    """Random prompts of these lengths, left-padded, and completions of random lengths from 1 to `columns`."""
    generator = torch.Generator().manual_seed(seed)
    width, n = max(prompt_lengths) + extra_padding, len(prompt_lengths)
    prompt_ids = torch.zeros(n, width, dtype=torch.long)
    prompt_mask = torch.zeros(n, width, dtype=torch.bool)
    for row, length in enumerate(prompt_lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        prompt_ids[row, width - length :] = ids
        prompt_mask[row, width - length :] = True
    rows = n * num_generations
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    mask = torch.arange(columns) < lengths[:, None]
    completion_ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator) * mask
    return Tokens(prompt_ids, prompt_mask, completion_ids, mask)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny matrices are slower on several threads, and results are the same everywhere on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
