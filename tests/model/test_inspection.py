"""Checks of a model: numbers in its configuration, headers of its weights, its size, finite weights, long prompts."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config import TrainConfig
from grpo.model.inspection import check_config, check_finite, check_size, read_headers
from grpo.model.language_model import check_prompts_fit
from grpo.model.loading import load
from tasks import jsonl
from tests.helpers.data import refusal, write


def test_headers_give_the_shapes_of_all_tensors(tmp_path):
    assert "no weights" in refusal(read_headers, tmp_path)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "x.safetensors")
    save_file({"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "y.safetensors")
    assert sorted(read_headers(tmp_path)) == [[2, 2], [3, 4], [5]]


def test_a_model_may_be_as_large_as_its_files_and_not_much_larger(monkeypatch):
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr("grpo.model.inspection.SPARE_NUMBERS", 0)
    check_size(config, -(-numbers // 8))  # an element of 32 bits can hold 8 numbers of 4 bits
    line = refusal(check_size, config, numbers // 9)
    assert f"{numbers:,} numbers" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    check_finite(model)
    with torch.no_grad():
        model[1].weight[2, 3] = value
    assert refusal(check_finite, model) == "1 of 16 numbers of the weight 1.weight are NaN or infinite"


def test_large_finite_weights_whose_sum_overflows_are_fine():
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 3e38)
    check_finite(model)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 600},
        {"text_config": {"n_layer": 10**9}},
        {"num_local_experts": 10**9},
        {"a": [{"b": 10**11}]},
        {"num_layers": -2},
    ],
    ids=str,
)
def test_a_number_that_no_model_with_these_weights_has_is_named(config):
    assert "config.json" in refusal(check_config, config, "config.json", 50)


def test_the_numbers_of_real_models_pass():
    real = {
        "rope_theta": 10**7,
        "max_position_embeddings": 10_485_760,
        "num_hidden_layers": 126,
        "max_window_layers": 28,
        "vocab_size_per_layer_input": 262_144,
    }
    check_config(
        json.loads(json.dumps({**real, "vocab_size": 262_208, "eos_token_id": [1, 106]})), "config.json", 400
    )


# --- questions that are longer than the model ---


def test_a_question_longer_than_the_model_is_named_with_its_line_and_the_limit(tmp_path):
    lm = load("starter", torch.device("cpu"))
    numbers = [{"question": f"How many are {i}?", "answer": i} for i in range(200)]
    config = TrainConfig(task="jsonl", max_new_tokens=22)
    data = write(tmp_path / "d.jsonl", numbers)
    check_prompts_fit(lm, jsonl.load(data), config)
    # The starter has 512 positions, and each digit is one token.
    for count, fits in ((400, True), (480, False)):
        data = write(tmp_path / "d.jsonl", [*numbers[:4], {"question": "7" * count, "answer": 1}, *numbers[4:]])
        if fits:
            check_prompts_fit(lm, jsonl.load(data), config)
        else:
            line = refusal(check_prompts_fit, lm, jsonl.load(data), config)
            assert line.startswith(f"{data}:5: ")
            assert "512 positions" in line
            assert "--max-new-tokens is 22" in line
    data = write(tmp_path / "d.jsonl", [*numbers, *({"question": f"{i} " * 600, "answer": 1} for i in range(9))])
    assert "(and 8 more: " in refusal(check_prompts_fit, lm, jsonl.load(data), config)
