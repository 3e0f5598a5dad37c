"""Countdown: its evaluator against hand-derived values and Python's own, its problems, and answers that cheat."""

import random
import re
import time
from fractions import Fraction

import pytest

from tasks.base import Problem
from tasks.common.prompts import ideal_completion
from tasks.countdown import Countdown, value
from tests.helpers.data import refusal
from tests.helpers.tasks import reward_of

TASK = Countdown()
PROBLEM = Problem(
    "Make 46 from 25, 3 and 7, each once, with + - * / and brackets.",
    "25 + 3 * 7",
    {"numbers": [25, 3, 7], "target": 46},
)


@pytest.mark.parametrize(
    ("text", "numbers", "expected"),
    [
        ("25 + 3 * 7", [3, 7, 25], 46),
        ("(25+3)*7", [3, 7, 25], 196),
        ("7 - 3 - 2", [2, 3, 7], 2),
        ("7 - (3 - 2)", [2, 3, 7], 6),
        ("8 / 4 / 2", [2, 4, 8], 1),
        ("8 / (4 / 2)", [2, 4, 8], 4),
        ("7 / 2", [2, 7], Fraction(7, 2)),
        ("2 * (7 / 2)", [2, 2, 7], 7),
        ("1 - 2 * 3 + 4", [1, 2, 3, 4], -1),
        ("((((5))))", [5], 5),
        (" 3×7 − 1 ÷ 1 ", [1, 1, 3, 7], 20),
        ("25 + 3 * 7 = 46", [3, 7, 25], 46),
        ("007 + 1", [1, 7], 8),
    ],
)
def test_values_by_hand(text, numbers, expected):
    assert value(text, numbers) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "46",
            "()",
            "25",
            "25 3 7",
            "25 + 3 *",
            "* 25 + 3 - 7",
            "25 + + 3 * 7",
            "-25 + 3 * 7",
            "25 + (-3) * 7",
        ),
        *(
            "(25 + 3 * 7",
            "25 + 3 * 7)",
            ")25 + 3 * 7(",
            "(25 + 3)(7)",
            "25 (+) 3 * 7",
            "25 + 3 * 7 = 45",
            "25 + 3 * 7 = 46 = 46",
        ),
        *(
            "25 + 3 * 7 =",
            "46 = 25 + 3 * 7",
            "25 + 3 * 7 + 0",
            "25 + 3 * 7 * 1",
            "25 + 21",
            "25 + 3 * 7 + 3 - 3",
            "2 5 + 3 * 7",
        ),
        *(
            "25 + 3 ** 7",
            "25 + 3 // 7",
            "25 + 3 * 7.0",
            "25.0 + 3 * 7",
            "2.5e1 + 3 * 7",
            "0x19 + 3 * 7",
            "25 + 3 * 7;",
            "abs(25) + 3 * 7",
        ),
        *(
            "25 + 3 * 7 # 46",
            "25 if 3 else 7",
            "٢٥ + 3 * 7",
            "25 + 3 * ７",
            "25 + 3 * 7\x00",
            "25 / (3 - 3) * 7",
            "0000025 + 3 * 7",
        ),
        *("(" * 200 + "25 + 3 * 7" + ")" * 200, "25 + 3 * 7" + " " * 500 + "0", "9" * 5000, "+" * 300),
    ],
)
def test_what_is_no_expression_of_the_numbers_is_wrong_and_earns_its_form_at_most(text):
    assert value(text, [25, 3, 7]) is None
    reward = reward_of(TASK, PROBLEM, f"<answer>{text}</answer>", [])
    assert not reward.correct
    assert reward.total <= 0.2


@pytest.mark.parametrize(
    ("answer", "total"),
    [("25 + 3 * 7", 1.0), ("7 * 3 + 25", 1.0), ("25 + 7 * 3 = 46", 1.0), ("(25 - 3) * 7", 0.2), ("25 + 7 + 3", 0.2)],
)
def test_many_answers_are_right(answer, total):
    assert reward_of(TASK, PROBLEM, ideal_completion(answer, "answer"), []).total == pytest.approx(total)


def test_an_expression_that_is_off_by_one_is_close():
    problem = Problem(PROBLEM.question, PROBLEM.answer, {"numbers": [25, 3, 7], "target": 45})
    assert reward_of(TASK, problem, "<answer>25 + 3 * 7</answer>", []).total == pytest.approx(0.4)
    assert reward_of(TASK, problem, "<answer>45</answer>", []).total == pytest.approx(0.2)


@pytest.mark.parametrize("numbers", [2, 3, 4, 6])
def test_problems_have_a_solution_and_a_working_that_leads_to_it(numbers):
    task = Countdown(numbers=numbers)
    for row in range(300):
        problem = task.training_problem(0, 1, row)
        of, target = problem.columns["numbers"], problem.columns["target"]
        assert 1 <= target <= 100
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted([*of, target])
        # Python computes the same
        assert eval(problem.answer) == pytest.approx(target)
        steps = problem.working.splitlines()
        assert len(steps) == numbers - 1
        assert steps[-1].endswith(f"= {target}")
        assert all(eval(step.replace("=", "==")) for step in steps)
        reward = reward_of(task, problem, ideal_completion(problem.answer, "answer", problem.working), [])
        assert (reward.correct, reward.well_formed) == (True, True)


def test_the_splits_share_no_problem_in_any_order_of_the_numbers():
    found = {
        "train": {TASK.key(TASK.training_problem(0, step, row)) for step in range(100) for row in range(16)},
        **{split: {TASK.key(p) for p in TASK.held_out(split, 300)} for split in ("validation", "test")},
    }
    assert min(map(len, found.values())) > 250
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


def test_the_evaluator_agrees_with_python_and_any_text_is_quick():
    rng, slowest, valid = random.Random(0), 0.0, 0
    pieces = ["25", "3", "7", "+", "-", "*", "/", "(", ")", " ", "=", "46", "x", "."]
    for i in range(20_000):
        if i % 2:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        else:  # the numbers, with brackets that often fit
            a, b, c = rng.sample(["25", "3", "7"], 3)
            opening, closing = rng.choice([("(", ")"), ("", ""), ("((", ")")])
            text = f"{opening}{a}{rng.choice('+-*/')}{b}{closing}{rng.choice('+-*/')}{c}"
            text = (
                text if rng.random() < 0.5 else f"{a}{rng.choice('+-*/')}{opening}{b}{rng.choice('+-*/')}{c}{closing}"
            )
        start = time.perf_counter()
        found = value(text, [25, 3, 7])
        slowest = max(slowest, time.perf_counter() - start)
        if found is not None:
            valid += 1
            assert eval(text.partition("=")[0]) == pytest.approx(float(found))
    assert valid > 5_000
    assert slowest < 0.05


def test_too_many_numbers_are_refused():
    assert "at most 8" in refusal(Countdown, numbers=9)
