"""Answers as people write them: computed numbers, fractions, units, marks, letters of a choice."""

from decimal import Decimal

import pytest

from tasks import jsonl
from tasks.common.judges import JUDGES, same_text
from tasks.common.prompts import ideal_completion
from tasks.rewards.scoring import parse_rewards, score
from tests.helpers.data import refusal, town_rows, write
from tests.helpers.tasks import untimed

QUOTIENTS = [{"question": f"What is {a} / {b}?", "answer": a / b} for a in range(1, 60) for b in (3, 7)]


def is_right(task, problem, text):
    """Return whether a completion with this answer is right."""
    return task.grade(problem, ideal_completion(text, "answer")).correct


def test_a_computed_number_is_a_number_and_compared_with_a_stated_tolerance(tmp_path):
    task = jsonl.load(write(tmp_path / "q.jsonl", QUOTIENTS))
    assert task.kind == "number"
    by_question = {problem.question: problem for problem in task.listed()}
    third, large = by_question["What is 1 / 3?"], by_question["What is 59 / 7?"]
    assert third.answer == "0.3333"
    assert all(is_right(task, third, text) for text in ("0.3333", "0.333", "0.3333333", ".33333"))
    assert not any(is_right(task, third, text) for text in ("0.33", "0.3", "0.334", "0", "1/3"))
    assert large.answer == "8.4286"
    assert is_right(task, large, "8.43")
    assert not is_right(task, large, "8.4")
    assert by_question["What is 3 / 3?"].tolerance == 0
    [note] = [note for note in task.notes if "decimals" in note]
    assert "of 118 answers" in note
    assert "0.1% and at most 0.005" in note
    rewards = parse_rewards(["exact=1", "correctness=1"], {})
    [reward] = score(rewards, [task.grade(third, "<answer>0.333</answer>")], {}, untimed)
    assert reward.parts == {"exact": 1.0, "correctness": 1.0}


def test_a_number_with_few_decimals_is_compared_exactly_and_a_tiny_one_keeps_its_digits(tmp_path):
    rows = [{"question": f"How much is {i}?", "answer": i + 0.25} for i in range(200)]
    rows += [{"question": "tiny", "answer": 0.0012345678912}, {"question": "sum", "answer": 0.1 + 0.2}]
    task = jsonl.load(write(tmp_path / "n.jsonl", rows))
    by_question = {problem.question: problem for problem in task.listed()}
    assert by_question["How much is 3?"].tolerance == 0
    assert by_question["tiny"].answer == "0.001235"
    assert by_question["sum"].answer == "0.3000"
    assert by_question["sum"].tolerance == Decimal("0.0003")
    assert is_right(task, by_question["sum"], "0.3")


@pytest.mark.parametrize(
    ("given", "answer", "same"),
    [
        ("25", "25%", True),
        ("25 %", "25%", True),
        ("24%", "25%", False),
        ("2/4", "1/2", True),
        ("0.5", "1/2", True),
        ("\\frac{1}{2}", "1/2", True),
        ("1/0", "1/0", True),
        ("2/0", "1/0", False),
        ("-1/2", "1/2", False),
        ("B", "(B)", True),
        ("B.", "(B)", True),
        ("**(B)**", "(B)", True),
        ("A", "(B)", False),
        ("42", "\\boxed{42}", True),
        ("42.0", "\\boxed{42}", True),
        ("42 km", "42 km", True),
        ("42.0", "42 km", True),
        ("42 miles", "42 km", False),
        ("**Paris**", "Paris", True),
        ("London", "Paris", False),
        ("2.30", "2:30", False),
    ],
)
def test_texts_are_compared_as_a_person_does(given, answer, same, tmp_path):
    assert same_text(given, answer) == same
    task = jsonl.load(write(tmp_path / "d.jsonl", [{"question": f"Q{i}", "answer": answer} for i in range(200)]))
    problem = task.training_problem(0, 1, 0)
    assert is_right(task, problem, given) == same
    assert is_right(task, problem, answer)


def test_the_start_says_how_odd_texts_are_compared(tmp_path):
    odd = [{"question": f"Q{i}", "answer": "25%"} for i in range(200)]
    [note] = jsonl.load(write(tmp_path / "o.jsonl", odd)).notes
    assert note.startswith(
        "200 of 200 answers are texts that begin with a digit or a sign, or single letters, such as '25%'"
    )
    assert "--correct math" in note
    names = [{**row, "answer": "Paris"} for row in town_rows()]
    assert jsonl.load(write(tmp_path / "t.jsonl", names)).notes == []
    assert jsonl.load(write(tmp_path / "o.jsonl", odd), correct="math").notes == []


@pytest.mark.parametrize(
    ("judge", "given", "answer", "right"),
    [
        ("choice", "B", "(B)", True),
        ("choice", "b) Paris", "B", True),
        ("choice", "B: Paris", "B. Paris", True),
        ("choice", "A", "B", False),
        ("choice", "Both", "B", False),
        ("math", "50%", "1/2", True),
        ("math", "0.5", "50%", True),
        ("math", "x = 1/2", "\\frac{1}{2}", True),
        ("math", "0.333", "1/3", True),
        ("math", "0.33", "1/3", False),
        ("math", "1/3", "0.3333", True),
        ("math", "42 km", "42 miles", False),
        ("math", "x+1", "x + 1", True),
        ("math", "x+2", "x + 1", False),
    ],
)
def test_the_ready_judges(judge, given, answer, right, tmp_path):
    assert JUDGES[judge](given=given, answer=answer, question="?", level=1) == right
    data = write(tmp_path / "d.jsonl", [{"question": f"Q{i}", "answer": answer} for i in range(200)])
    task = jsonl.load(data, correct=judge)
    assert task.kind == "text"
    assert task.files.keys() == {data}
    problem = task.training_problem(0, 1, 0)
    assert is_right(task, problem, given) == right
    assert "choice, math or FILE.py:FUNCTION" in refusal(jsonl.load, data, correct="chioce")
