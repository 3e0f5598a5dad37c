"""Make tiny random models in the shapes of real ones, as folders: weights, a real tokenizer, a chat template.

    python -m tests.helpers.zoo FOLDER        writes all of them, FOLDER/qwen2 and so on

The tokenizers are trained here on a few lines of arithmetic. transformers 5 loads a folder with the tokenizer class
that it knows for the shape, whatever the folder says, so each is built with that class.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2Tokenizer,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that the logits differ: a test on a uniform softmax would pass with wrong logits.
    "initializer_range": 0.3,
}


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    """Return rotary settings that differ from the defaults, so that a test fails if they are not saved."""
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3_ROPE = rope(
    5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
GEMMA3_ROPE = {"sliding_attention": rope(5e3), "full_attention": rope(1e5, "linear", factor=8.0)}
PHI4_ROPE = rope(
    1e5, "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 9.0]
)
WINDOW = 6
MERGES = 90
LINES = [
    f"What is ({a} {op} {b}) * {a}? Give the result as an integer in <answer>...</answer>. user system assistant"
    for a in range(11)
    for b in range(11)
    for op in "+-*"
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# By kind: configuration class, its settings, chat template, and the end tokens of its generation config.
KINDS = {
    "qwen2": (
        Qwen2Config,
        {"tie_word_embeddings": True, "rope_parameters": rope(1e6)},
        CHATML,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": (
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": rope(1e6)},
        CHATML,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "llama": (
        LlamaConfig,
        {"tie_word_embeddings": False},
        LLAMA3,
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "llama3": (
        LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        LLAMA3,
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "query_pre_attn_scalar": 8, "rope_parameters": GEMMA3_ROPE},
        GEMMA2,
        ["<eos>", "<end_of_turn>"],
    ),
    "phi3": (
        Phi3Config,
        {"sliding_window": None, "initializer_range": 0.2, "rope_parameters": rope(1e5)},
        PHI3,
        ["<|end|>", "<|endoftext|>"],
    ),
    "phi4": (
        Phi3Config,
        {"sliding_window": None, "rope_parameters": PHI4_ROPE, "original_max_position_embeddings": 256}
        | {"tie_word_embeddings": True},
        PHI3,
        ["<|end|>", "<|endoftext|>"],
    ),
    "gpt2": (GPT2Config, {"n_positions": 512}, None, ["<|endoftext|>"]),
}

# Models with layers of convolution or linear attention, which use none of the shortcuts that KINDS are tested with.
HYBRIDS = {
    "lfm2": (
        Lfm2Config,
        {"layer_types": ["conv", "full_attention", "conv"]},
        CHATML,
        ["<|im_end|>"],
    ),
    "qwen3_5": (
        Qwen3_5TextConfig,
        {"head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
        | {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        CHATML,
        ["<|im_end|>"],
    ),
    "falcon_h1": (
        FalconH1Config,
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        CHATML,
        ["<|im_end|>"],
    ),
}


def random_model(kind: str, seed: int = 1, **ids: int | list[int] | None) -> PreTrainedModel:
    """Return a random model of a kind, in eval mode, with settings such as `vocab_size` and `eos_token_id`."""
    config_class, own, _, _ = (KINDS | HYBRIDS)[kind]
    config: PreTrainedConfig = config_class(**(SIZES | own | ids))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def train(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    """Return the tokenizer with a vocabulary of special tokens, alphabet and merges."""
    size = len(special) + len(alphabet) + MERGES
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_level(special: list[str], pattern: str | None = None) -> Tokenizer:
    """Return a trained byte-level BPE tokenizer that splits words by this pattern, or by GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=not split)])
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, special, sorted(pre_tokenizers.ByteLevel.alphabet()))


def sentencepiece_like(special: list[str]) -> Tokenizer:
    """Return a trained BPE tokenizer like Gemma's: spaces are characters; unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return train(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], [])


def parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the arguments for the constructor of a transformers tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def real_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the class and special tokens of a kind, without a chat template."""
    if kind.startswith("qwen") or kind in HYBRIDS:
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = Qwen2Tokenizer(
            **parts(byte_level(special, PRETOKENIZE_REGEX)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return tokenizer
    if kind.startswith("llama"):  # no pad token, and the tokenizer adds a BOS
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        backend = byte_level(special)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token="<|eot_id|>")
    if kind == "gemma3":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
        tokenizer = GemmaTokenizer(**parts(sentencepiece_like(special)))
        tokenizer.add_special_tokens({"additional_special_tokens": special[5:]})
        return tokenizer
    if kind.startswith("phi"):
        special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level(special), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )
    return GPT2Tokenizer(**parts(byte_level(["<|endoftext|>"])))


def build(folder: Path, kind: str) -> Path:
    """Write a model folder of a kind."""
    tokenizer = real_tokenizer(kind)
    *_, template, ends = (KINDS | HYBRIDS)[kind]
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = random_model(kind, **ids)
    with torch.no_grad():  # biases and norms are not random as they are made, so an exchange of them would not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "post_" in name:  # Gemma's, where the embedding would outweigh all layers, and repeat itself
                parameter.add_(6)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(ends), do_sample=True, top_k=2, temperature=0.6
    )
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for name in KINDS:
        build(Path(sys.argv[1]) / name, name)
