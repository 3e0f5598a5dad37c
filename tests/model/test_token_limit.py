"""The note about completions that are longer than the token limit: it names the limit to take."""

import re

import pytest
import torch

from grpo.config import TrainConfig
from grpo.model.language_model import limit_note
from grpo.model.loading import load
from tasks import jsonl
from tasks.arithmetic import Arithmetic
from tasks.common.shots import solved_problem, with_shots
from tasks.registry import make_task
from tests.helpers.data import write

SFT = {"max_new_tokens": 22, "sft_steps": 2}


@pytest.fixture(scope="module")
def lm():
    """Load the starter."""
    return load("starter", torch.device("cpu"))


def steps_file(path, steps):
    """Write problems whose working has up to `steps` lines."""
    rows = [
        {
            "question": f"What is {i} + {i % steps}?",
            "answer": i + i % steps,
            "solution": "\n".join(f"{i} + {k} = {i + k}" for k in range(1, i % steps + 1)),
        }
        for i in range(200)
    ]
    return write(path, rows)


def test_workings_longer_than_the_limit_are_named_with_the_limit_that_holds_them(lm, tmp_path):
    task = jsonl.load(steps_file(tmp_path / "d.jsonl", 9))
    note = limit_note(lm, task, TrainConfig(**SFT))
    assert note.startswith("48 of 64 completions that fine-tuning teaches have more tokens than --max-new-tokens 22")
    needed = int(re.search(r"Take --max-new-tokens (\d+): ", note)[1])
    assert needed == max(len(lm.completion(solved_problem(task, 0, -1, row)[1])) for row in range(64))
    assert limit_note(lm, task, TrainConfig(max_new_tokens=needed, sft_steps=2)) is None
    assert limit_note(lm, task, TrainConfig(max_new_tokens=needed - 1, sft_steps=2)) is not None
    assert limit_note(lm, task, TrainConfig(max_new_tokens=22)) is None  # the answers alone fit


def test_workings_longer_than_the_model_are_to_be_shortened(lm, tmp_path):
    task = jsonl.load(steps_file(tmp_path / "d.jsonl", 90))
    note = limit_note(lm, task, TrainConfig(**SFT))
    assert "The model has only 512 positions, so shorten them" in note
    assert "Take" not in note


def test_worked_examples_and_bare_answers_longer_than_the_limit_are_named_too(lm, tmp_path):
    task = with_shots(jsonl.load(steps_file(tmp_path / "d.jsonl", 9)), 4)
    assert " of 4 worked examples in the prompt have more" in limit_note(lm, task, TrainConfig(max_new_tokens=22))
    rows = [{"question": f"Write town {i}.", "answer": f"A very long name of town {i}"} for i in range(200)]
    task = jsonl.load(write(tmp_path / "t.jsonl", rows))
    note = limit_note(lm, task, TrainConfig(max_new_tokens=22))
    assert note.startswith("64 of 64 right answers without any working have more tokens")


def test_the_examples_of_a_mixture_are_measured(lm):
    config = TrainConfig(task=("arithmetic=0.5", "reverse=0.5"), shots=1, max_new_tokens=3)
    assert "2 of 2 worked examples" in limit_note(lm, make_task(config), config)


def test_the_default_run_has_no_such_note(lm):
    assert limit_note(lm, Arithmetic(), TrainConfig(max_new_tokens=22)) is None
