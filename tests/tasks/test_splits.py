"""No problem is in two splits in two spellings: by brute force over the default range, and in the starter's data."""

from collections import defaultdict

import pytest

from grpo.starter import build, data
from tasks.arithmetic import Arithmetic
from tasks.base import split_of
from tests.helpers.tasks import fingerprint


def print_of(e):
    return fingerprint(e.a, e.op, e.b, e.op2, e.c)


@pytest.fixture(scope="module")
def expressions():
    task = Arithmetic()
    return [task.expression(index) for index in range(task.size)]


def test_no_spelling_of_a_problem_is_in_another_split(expressions):
    splits = defaultdict(set)
    for expression in expressions:
        splits[print_of(expression)].add(split_of(expression.key))
    assert len(splits) < len(expressions) / 2, "spellings are found"
    assert [found for found in splits.values() if len(found) > 1] == []


def test_held_out_problems_have_no_spelling_among_the_problems_that_are_trained_on(expressions):
    trained = {print_of(e) for e in expressions if split_of(e.key) == "train"}
    by_question = {f"What is {e}?": e for e in expressions}
    for split in ("validation", "test"):
        held_out = Arithmetic().held_out(split, 10_000)
        prints = [print_of(by_question[problem.question]) for problem in held_out]
        assert not trained & set(prints)
        assert len(set(prints)) == len(prints) > 400


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1 + 2) + 3", "(3 + 1) + 2"),
        ("(4 * 2) * 3", "(3 * 4) * 2"),
        ("(5 - 2) - 3", "(5 - 3) - 2"),
        ("(1 + 4) - 9", "(4 - 9) + 1"),
        ("(4 - 9) + 1", "(1 - 9) + 4"),
        ("(1 + 4) * 9", "(4 + 1) * 9"),
        ("(2 * 4) - 9", "(4 * 2) - 9"),
    ],
)
def test_spellings_share_a_key(one, other, expressions):
    by_text = {str(e): e for e in expressions}
    assert by_text[one].key == by_text[other].key
    assert print_of(by_text[one]) == print_of(by_text[other])


@pytest.mark.parametrize(("one", "other"), [("(9 - 4) + 1", "(4 - 9) + 1"), ("(2 - 4) * 9", "(4 - 2) * 9")])
def test_other_problems_have_other_keys(one, other, expressions):
    by_text = {str(e): e for e in expressions}
    assert by_text[one].key != by_text[other].key


def test_the_starter_is_never_trained_on_a_held_out_problem(expressions):
    by_question = {f"What is {e}?": e for e in expressions}
    held_out = {
        print_of(by_question[problem.question])
        for split in ("validation", "test")
        for problem in Arithmetic().held_out(split, 10_000)
    }
    asked = 0
    for step in range(0, build.STEPS, 40):
        for row in range(data.BATCH):
            messages, _ = data.example(step, row, 0.5)
            if expression := by_question.get(messages[-1]["content"]):
                asked += 1
                assert print_of(expression) not in held_out
    assert asked > 1000
