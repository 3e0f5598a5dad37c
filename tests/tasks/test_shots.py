"""Worked examples: right, in the form of the style, of the training split, and before each question."""

import json
from dataclasses import replace

import pytest

from tasks import gsm8k, jsonl
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.prompts import STYLES
from tasks.common.shots import solution, with_shots
from tasks.countdown import Countdown
from tasks.registry import TASKS
from tasks.reverse import Reverse
from tests.helpers.data import GSM8K_ROWS, town_rows, write
from tests.helpers.tasks import SUM, TASK, fingerprint
from tests.tasks.test_arithmetic import tokens_of


def a_task(name, style, folder):
    """Return a task of each kind in a style."""
    if name == "gsm8k":
        return gsm8k.load(write(folder / "g.jsonl", GSM8K_ROWS), style)
    if name == "jsonl":
        return jsonl.load(write(folder / "t.jsonl", town_rows()), style)
    return {"arithmetic": Arithmetic, "countdown": Countdown, "reverse": Reverse}[name](style=style)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TASKS)
def test_examples_are_right_answers_to_training_problems_as_turns_before_the_question(name, style, tmp_path):
    plain = a_task(name, style, tmp_path)
    task = with_shots(plain, 3)
    [system, *turns, question] = task.messages("What now?")
    assert [system, question] == plain.messages("What now?")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    assert turns == with_shots(a_task(name, style, tmp_path), 3).messages("?")[1:-1]  # the same each time
    held_out = {
        p.question
        for split in ("validation", "test")
        for p in plain.held_out(split, 500 if name in ("reverse", "countdown") else 10**6)
    }
    asked = [turn["content"] for turn in turns[::2]]
    assert len(set(asked)) == 3
    assert not set(asked) & held_out
    known = {p.question: p for row in range(500) for p in [plain.training_problem(0, -1, row)]}
    for question, answer in zip(asked, turns[1::2], strict=True):
        attempt = plain.grade(known[question], answer["content"])
        assert attempt.correct
        assert attempt.well_formed


def test_no_spelling_of_an_example_is_held_out():
    held_out = {
        fingerprint(*tokens_of(p.question)) for split in ("validation", "test") for p in TASK.held_out(split, 10**6)
    }
    asked = [turn["content"] for turn in with_shots(TASK, 40).examples[::2]]
    assert not {fingerprint(*tokens_of(question)) for question in asked} & held_out


def test_the_working_is_that_of_the_task():
    assert solution(TASK, replace(SUM, working="4 - 9 = -5")) == "4 - 9 = -5\n<answer>-30</answer>"
    [problem] = [
        p for row in range(300) for p in [TASK.training_problem(0, 1, row)] if p.question == "What is (2 * 5) * 7?"
    ][:1]
    assert problem.working == "2 * 5 = 10\n10 * 7 = 70"
    row = {"question": "How much?", "answer": "She sold $<<9*2=18>>18 and kept 2.\nSo 16.\n#### 16"}
    problem = gsm8k.problem_of(row)
    assert problem.working == "She sold $18 and kept 2.\nSo 16."
    assert problem.columns["solution"] == row["answer"]
    assert jsonl.problem_of({"question": "q", "answer": "a", "solution": " because "}, "answer").working == "because"
    assert jsonl.problem_of({"question": "q", "answer": "a", "solution": 3}, "answer").working == ""


def test_a_working_with_a_tag_in_it_is_left_out():
    problem = Problem("q", "5", working="so <answer>4</answer>")
    assert solution(TASK, problem) == "<answer>5</answer>"
    assert solution(TASK, Problem("q", "five")) is None  # no integer: not even the answer alone is right


def test_more_examples_than_problems_are_refused_in_one_line(tmp_path):
    rows = [{"question": f"How many are {i}?", "answer": str(i)} for i in range(60)]
    task = jsonl.load(write(tmp_path / "n.jsonl", rows))
    with pytest.raises(ValueError, match=r"^--shots is 60; only \d+ different training problems") as caught:
        with_shots(task, 60)
    assert "\n" not in str(caught.value)
    assert json.dumps(with_shots(task, 5).examples)
