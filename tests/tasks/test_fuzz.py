"""Fuzzing of parser and rewards: any text gets an answer or none and rewards from 0 to 1, within a millisecond.

Half of the texts are nearly right, because a reward that pays for too much shows there.
"""

import math
import random
import time
from decimal import Decimal

import pytest

from tasks.base import KINDS, Problem
from tasks.common.parsing import parse_answer
from tasks.common.prompts import STYLES, ideal_completion
from tasks.common.qa_task import QATask
from tasks.rewards.functions import REWARDS

LIMIT = 1e-3  # seconds a call
TAGS = ["<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>"]
FRAGMENTS = [
    *(TAGS * 3),
    *(tag[:cut] for tag in TAGS for cut in (1, 2, -1)),
    *(tag[cut:] for tag in TAGS for cut in (1, -1)),
    *("<Answer>", "<answer/>", "<|im_end|>", "<|im_start|>", "\\boxed{", "}", "{0}", "%s", "None", "nan", "inf"),
    *("-", "--", "+", "0", "00", "5", "-30", "42", "1e3", "1_000", "0x1f", "7.0", "9" * 18, "9" * 19, "1" * 5000),
    *("٤٢", "４２", "²", "½", "Ⅷ", "一", "−5", "߁", "𝟝", "−", "$", "$5", ",", ",000", " 000", ".", ".5", ".0"),
    *("\x00", "\x07", "\x1b[2J", "\r", "\n", "\t", "\v", "\x1c", "\x85", "\u2028", "\u200b", "\u202e", "\ufeff"),
    *("\ud800", "\udfff", "\ud83d\ude00", "🙂", "é", "e\u0301", "ﬀ", "ß", "İ", "a", " ", "   ", "4 - 9 = -5\n"),
]
LONG = [
    "<",
    ">",
    "<answer>",
    "</answer>",
    "<answer></answer>",
    "<think>",
    "</think>",
    " ",
    "\n",
    "9",
    "-",
    "\x00",
    "🙂",
]


def texts(rng, problem):
    """Yield completions without end: fragments in any order, long runs, right answers slightly changed."""
    while True:
        kind = rng.random()
        if kind < 0.45:
            text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(10)))
        elif kind < 0.9:
            text = ideal_completion(problem.answer, rng.choice(STYLES), rng.choice(("", "4 - 9 = -5", "<", "\ud800")))
            text = rng.choice(FRAGMENTS) * (kind < 0.5) + text + rng.choice(FRAGMENTS) * (kind > 0.85)
        elif kind < 0.99:
            text = "".join(map(chr, rng.choices(range(0x3000), k=rng.randrange(40))))
        else:
            text = rng.choice(LONG) * rng.randrange(2000) + rng.choice(["", "<answer>5</answer>", "</answer>"])
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
            place = rng.randrange(len(text) + 1)
            inside = rng.choice((*FRAGMENTS, chr(rng.randrange(0x110000))))
            text = text[:place] + inside * rng.randrange(2) + text[place + rng.randrange(3) :]
        yield text


def seconds(call, *args):
    """Return the result of a call and its seconds; repeat a slow one, which another process may have interrupted."""
    start = time.perf_counter()
    result = call(*args)
    taken = time.perf_counter() - start
    for _ in range(20 if taken > LIMIT else 0):
        start = time.perf_counter()
        call(*args)
        taken = min(taken, time.perf_counter() - start)
    return result, taken


@pytest.mark.parametrize(
    "number", [20_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_any_completion_gets_an_answer_and_a_reward_at_once(number):
    rng = random.Random(number)
    tasks = [QATask(name="any", style=style, kind=kind) for style in STYLES for kind in KINDS]
    problem = Problem("What is (4 - 9) * 6?", "-30")
    right = 0
    for _, text in zip(range(number), texts(rng, problem), strict=False):
        task = rng.choice(tasks)  # each text in one of nine ways
        answer, taken = seconds(parse_answer, text, task.kind)
        assert answer is None or isinstance(answer, int | Decimal | str), ascii(text)
        assert taken < LIMIT, ascii(text)
        attempt, taken = seconds(task.grade, problem, text)
        assert taken < LIMIT, ascii(text)
        assert attempt.answer == answer
        assert attempt.correct <= (answer is not None)
        assert attempt.well_formed <= (answer is not None)
        right += attempt.correct
        for name, reward in REWARDS.items():
            value, taken = seconds(reward, attempt)
            assert math.isfinite(value), (name, ascii(text))
            assert 0 <= value <= 1, (name, ascii(text))
            assert taken < LIMIT, (name, ascii(text))
    assert 0.02 < right / number < 0.6, "texts that are right and texts that are not"
