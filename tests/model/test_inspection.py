"""Checks of a model: numbers in its configuration, headers of its weights, its size, finite weights, long prompts."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config import TrainConfig
from grpo.model.inspection import check_config, check_finite, check_size, read_headers
from grpo.model.language_model import fitting_task
from grpo.model.loading import load
from tasks import jsonl
from tasks.common.rows import normal
from tasks.registry import make_task
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


def test_a_question_longer_than_the_model_is_left_out_and_named_with_its_line_and_the_limit(tmp_path):
    lm = load("starter", torch.device("cpu"))
    numbers = [{"question": f"How many are {i}?", "answer": i} for i in range(200)]
    config = TrainConfig(task="jsonl", max_new_tokens=22)
    data = write(tmp_path / "d.jsonl", numbers)
    task = jsonl.load(data)
    assert fitting_task(lm, task, config) is task
    # The starter has 512 positions, and each digit is one token.
    for count, fits in ((400, True), (480, False)):
        data = write(tmp_path / "d.jsonl", [*numbers[:4], {"question": "7" * count, "answer": 1}, *numbers[4:]])
        task = jsonl.load(data)
        fitting = fitting_task(lm, task, config)
        assert (fitting is task) == fits
    assert len(list(task.listed())) == 201
    assert max(len(problem.question) for problem in fitting.listed()) < 99
    assert len(list(fitting.listed())) == 200
    [note] = fitting.notes
    assert note.startswith("1 of 201 problems are left out")
    assert f"({data}:5: " in note
    assert "--max-new-tokens 22" in note
    assert "512 positions" in note


def test_the_run_ends_only_if_most_questions_are_too_long_or_a_split_is_left_empty(tmp_path):
    lm = load("starter", torch.device("cpu"))
    config = TrainConfig(task="jsonl", max_new_tokens=22)
    numbers = [{"question": f"How many are {i}?", "answer": i} for i in range(200)]
    long = [{"question": f"{i} " * (10**6 if i == 5 else 600), "answer": 1} for i in range(300)]
    fitting = fitting_task(lm, jsonl.load(write(tmp_path / "d.jsonl", [*numbers, *long[:9]])), config)
    assert len(list(fitting.listed())) == 200
    assert "9 of 209 problems are left out" in fitting.notes[0]
    assert fitting.notes[0].endswith(", …).")
    data = write(tmp_path / "d.jsonl", [*numbers, *long])
    line = refusal(fitting_task, lm, jsonl.load(data), config)
    assert line.startswith(f"{data}:2")
    assert "(and 299 more of 500: " in line
    task = jsonl.load(write(tmp_path / "d.jsonl", [*numbers, *long[:150]]))
    short = {normal(row["question"]) for row in numbers}
    held_out = task.problems["test"]
    task = replace(task, problems={**task.problems, "test": [p for p in held_out if normal(p.question) not in short]})
    assert "the prompt has " in refusal(fitting_task, lm, task, config)


def test_each_task_of_a_mixture_leaves_out_its_long_questions(tmp_path):
    lm = load("starter", torch.device("cpu"))
    numbers = [{"question": f"How many are {i}?", "answer": i} for i in range(200)]
    data = write(tmp_path / "d.jsonl", [*numbers, {"question": "7" * 600, "answer": 1}])
    config = TrainConfig(task=("arithmetic=0.5", "jsonl=0.5"), data=data, max_new_tokens=22)
    fitting = fitting_task(lm, make_task(config), config)
    assert len(fitting.listed()) == 200
    assert fitting.notes[0].startswith("jsonl: 1 of 201 problems are left out")
