"""A user's judge of what is right: `--correct FILE.py:FUNCTION`, and one line about whatever goes wrong."""

from decimal import Decimal

import numpy
import pytest

from tasks import jsonl
from tasks.common.prompts import ideal_completion
from tasks.common.user_file import Judge
from tasks.rewards.scoring import parse_rewards, score
from tests.helpers.data import refusal, write
from tests.helpers.tasks import untimed

COLOURS = [{"question": f"Name the colours of flag {i}.", "answer": f"red blue c{i}", "level": i} for i in range(200)]
SAME_WORDS = """
def same_words(given, question, answer, **columns):
    return set(given.split()) == set(answer.split())
"""


@pytest.fixture
def colours(tmp_path):
    return write(tmp_path / "colours.jsonl", COLOURS)


def in_file(tmp_path, text, name="same_words"):
    (tmp_path / "judge.py").write_text(text, encoding="utf-8")
    return f"{tmp_path / 'judge.py'}:{name}"


def test_the_judge_decides_what_is_right(colours, tmp_path):
    plain = jsonl.load(colours)
    task = jsonl.load(colours, correct=in_file(tmp_path, SAME_WORDS))
    problem = task.held_out("test", 1)[0]
    other_order = " ".join(reversed(problem.answer.split()))
    for answer, equal, right in ((problem.answer, True, True), (other_order, False, True), ("red", False, False)):
        completion = ideal_completion(answer, "answer")
        assert plain.grade(problem, completion).correct == equal
        assert task.grade(problem, completion).correct == right
    # a completion without an answer is wrong without being judged
    assert not task.grade(problem, "red blue").correct
    # the reward `exact` follows the judge, `close` compares with the answer of the file
    attempts = [task.grade(problem, ideal_completion(other_order, "answer"))]
    [reward] = score(parse_rewards(["exact=1", "close=1"], {}), attempts, {}, untimed)
    assert reward.parts == {"exact": 1.0, "close": 0.0}


def test_the_judge_gets_the_parsed_answer_and_all_columns(tmp_path):
    seen = in_file(tmp_path, "seen = []\ndef judge(**known):\n    seen.append(known)\n    return True\n", "judge")
    rows = [{"question": f"{i} + 1.5", "answer": i + 1.5, "level": i} for i in range(200)]
    task = jsonl.load(write(tmp_path / "n.jsonl", rows), correct=seen)
    problem = task.training_problem(0, 1, 0)
    assert task.grade(problem, "<answer>7.25</answer>").correct
    known = task.judge.file.module.seen[-1]
    assert known == {
        "given": Decimal("7.25"),
        "question": problem.question,
        "answer": problem.answer,
        "level": problem.columns["level"],
    }


def test_the_file_is_one_of_those_that_may_not_change(colours, tmp_path):
    judge = in_file(tmp_path, SAME_WORDS)
    task = jsonl.load(colours, correct=judge)
    assert set(task.files) == {colours, judge.rpartition(":")[0]}
    changed = jsonl.load(colours, correct=in_file(tmp_path, SAME_WORDS + "# other\n"))
    assert changed.files != task.files


@pytest.mark.parametrize("verdict", [True, False, numpy.True_, numpy.False_])
def test_true_and_false_are_verdicts_of_numpy_too(verdict, colours, tmp_path):
    task = jsonl.load(colours, correct=in_file(tmp_path, SAME_WORDS))
    judge = Judge("judge", task.judge.file, lambda **known: verdict)
    assert judge(task.training_problem(0, 1, 0), "red") is bool(verdict)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def same_words(given, **columns):\n    return given['red']\n", ["TypeError", "judge.py:2"]),
        ("def same_words(given, **columns):\n    return 1.0\n", ["returned 1.0, not True or False"]),
        ("def same_words(given, **columns):\n    pass\n", ["returned None"]),
        ("def same_words():\n    return True\n", ["TypeError", "judge.py"]),
        ("import sys\ndef same_words(**known):\n    sys.exit(3)\n", ["SystemExit", "judge.py:3"]),
        ("def same_words(given, **columns):\n    return False\n", ["--correct 'same_words' rejects the 'answer'"]),
        ("def other(given, **columns):\n    return True\n", ["has no function 'same_words'; it has other"]),
        ("def same_words(given\n", ["cannot run", "SyntaxError"]),
    ],
)
def test_a_judge_that_fails_is_refused_in_one_line_before_anything_is_trained(text, words, colours, tmp_path):
    said = refusal(jsonl.load, colours, correct=in_file(tmp_path, text))
    for word in words:
        assert word in said


@pytest.mark.parametrize("spec", ["judge.py", "judge.py:", ":judge", "judge"])
def test_a_judge_that_is_not_named_is_refused(spec, colours):
    assert "write choice, math or FILE.py:FUNCTION" in refusal(jsonl.load, colours, correct=spec)


def test_a_file_that_is_not_there(colours, tmp_path):
    assert "cannot read" in refusal(jsonl.load, colours, correct=f"{tmp_path / 'none.py'}:judge")
