"""The registry: tasks of one's own, their judgement, and the options that tasks declare."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import pytest

from tasks import registry
from tasks.arithmetic import Arithmetic
from tasks.base import Option, Problem
from tasks.common.prompts import DEFAULT_WORDING, system_prompt
from tasks.common.qa_task import QATask
from tasks.registry import TASKS, TaskOption, make_task, task_options
from tests.helpers.data import refusal, town_rows, write
from tests.helpers.tasks import reward_of, value

DIVISOR = Problem("Name a divisor of 12.", "6", {"number": 12})


@dataclass(frozen=True, kw_only=True)
class Divisors(QATask):
    """A task with many right answers: any divisor of a number from `smallest` on."""

    smallest: Annotated[int, Option("smallest divisor that counts", 1)] = 2
    word_list: Annotated[str, Option("file of words", inheritable=False)] = ""
    name: str = "divisors"

    def is_correct(self, problem, answer):
        """Return whether `answer` divides the number of the problem."""
        return answer >= self.smallest and problem.columns["number"] % answer == 0


def load_multiples(smallest: Annotated[int, Option("smallest multiple", 5)] = 7, style="answer", system_prompt=""):
    """Load a task that shares an option with `Divisors`; only its meaning, bound and default differ."""
    return Divisors(name="multiples", smallest=smallest, style=style, system_prompt=system_prompt)


def settings(task, **given):
    """Return settings of a run: the task, these, and the defaults of all other options."""
    defaults = {name: option.default for name, option in task_options().items()}
    return SimpleNamespace(
        **{
            "task": task,
            "prompt_style": "answer",
            "system_prompt": "",
            "prompt_wording": "form",
            "shots": 0,
            **defaults,
            **given,
        }
    )


@pytest.fixture
def divisors(monkeypatch):
    """Register the scratch task as --task divisors."""
    monkeypatch.setitem(registry.TASKS, "divisors", Divisors)


# --- the judgement of a task with many right answers ---


@pytest.mark.parametrize(
    ("answer", "correct"),
    [*((str(n), True) for n in (2, 3, 4, 6, 12)), *((str(n), False) for n in (-3, 0, 1, 5, 7, 24))],
)
def test_a_task_with_many_right_answers_grades_by_its_own_judgement(answer, correct):
    task, completion = Divisors(), f"<answer>{answer}</answer>"
    attempt = task.grade(DIVISOR, completion)
    assert (attempt.correct, attempt.well_formed) == (correct, True)
    assert (attempt.answer, attempt.gold) == (int(answer), 6)  # the problem's own answer stays 6
    assert value("exact", completion, DIVISOR, task) == float(correct)
    reward = reward_of(task, DIVISOR, completion, ["exact=1"])
    assert (reward.total, reward.correct, reward.well_formed) == (float(correct), correct, True)


@pytest.mark.parametrize(
    "completion", ["", "6", "<answer>six</answer>", "<answer>6</answer>.", "<answer>2</answer>" * 2]
)
def test_a_task_is_not_asked_about_a_malformed_completion(completion, monkeypatch):
    monkeypatch.setattr(Divisors, "is_correct", lambda *_: pytest.fail("asked about a malformed completion"))
    attempt = Divisors().grade(DIVISOR, completion)
    assert (attempt.correct, attempt.well_formed, attempt.answer) == (False, False, None)
    assert value("exact", completion, DIVISOR, Divisors()) == 0.0


def test_rewards_that_compare_with_the_problems_own_answer_stay_as_they_are():
    completion = "<answer>3</answer>"  # a divisor, but neither 6 nor within ±1 of it
    by_name = {
        name: value(name, completion, DIVISOR, Divisors()) for name in ("format", "close", "exact", "correctness")
    }
    assert by_name == {"format": 1.0, "close": 0.0, "exact": 1.0, "correctness": 0.0}


def test_without_a_judgement_of_its_own_a_task_accepts_the_problems_answer_only():
    task = QATask(name="divisors")
    assert [task.grade(DIVISOR, f"<answer>{n}</answer>").correct for n in (3, 6, 12)] == [False, True, False]


# --- the options that tasks declare ---


def number(*tasks, **known):
    """Return an option of these tasks whose value is a whole number."""
    return TaskOption(tasks=tasks, type=int, **known)


def text(*tasks, **known):
    """Return an option of these tasks whose value is a text, by default empty."""
    return TaskOption(tasks=tasks, type=str, default="", **known)


def test_a_file_with_annotations_from_the_future_declares_its_options_too(monkeypatch):
    def load(depth: "Annotated[int, Option('depth of a sum', 1)]" = 3, style="answer", system_prompt=""):
        """Load a task; its annotation is a string, as `from __future__ import annotations` makes it."""

    monkeypatch.setitem(registry.TASKS, "deep", load)
    assert task_options()["depth"].default == 3


def test_the_options_are_those_that_the_tasks_declare():
    data = "gsm8k, jsonl: problem file (.jsonl, .json, .csv, .parquet), or OWNER/NAME of a data set on the Hub"
    held_out = "gsm8k, jsonl: problems for {}, instead of a tenth of --data"
    columns = "gsm8k, jsonl: names of columns in the data, such as question=problem,answer=solution"
    correct = "jsonl: how to judge answers: choice, math, or FILE.py:FUNCTION; default: equality"
    smallest = "arithmetic: smallest operand; a negative one is written in brackets"
    largest, numbers = "arithmetic: largest operand", "countdown: how many numbers a problem gives"
    assert task_options() == {
        "max_operand": number("arithmetic", default=10, meaning=largest, least=1),
        "min_operand": number("arithmetic", default=0, meaning=smallest),
        "numbers": number("countdown", default=3, meaning=numbers, least=2),
        "largest_number": number("countdown", default=20, meaning="countdown: largest of the given numbers", least=2),
        "data": text("gsm8k", "jsonl", meaning=data, inheritable=False, common=True),
        "validation_data": text("gsm8k", "jsonl", meaning=held_out.format("validation"), inheritable=False),
        "test_data": text("gsm8k", "jsonl", meaning=held_out.format("the test"), inheritable=False),
        "columns": text("gsm8k", "jsonl", meaning=columns, inheritable=False),
        "correct": text("jsonl", meaning=correct, inheritable=False),
    }


def test_a_registered_task_brings_its_annotated_parameters_as_options(divisors):
    options = task_options()
    meaning = "divisors: smallest divisor that counts"
    assert options["smallest"] == number("divisors", default=2, meaning=meaning, least=1)
    assert options["word_list"] == text("divisors", meaning="divisors: file of words", inheritable=False)
    assert not {"name", "kind", "style", "system_prompt", "example"} & set(options)  # parameters without an Option


def test_two_tasks_may_share_an_option_which_the_first_describes(divisors, monkeypatch):
    monkeypatch.setitem(registry.TASKS, "multiples", load_multiples)
    meaning = "divisors, multiples: smallest divisor that counts"
    assert task_options()["smallest"] == number("divisors", "multiples", default=2, meaning=meaning, least=1)
    for task in ("divisors", "multiples"):
        made = make_task(settings(task, smallest=4))
        assert (made.name, made.smallest) == (task, 4)


# --- making the task of a run ---


def test_a_task_gets_its_own_options_style_and_system_prompt(divisors):
    task = make_task(settings("divisors", smallest=4, prompt_style="think", system_prompt="Be brief."))
    assert task == Divisors(smallest=4, style="think", system_prompt="Be brief.")
    task = make_task(settings("arithmetic", min_operand=-2, max_operand=7, prompt_style="reasoning"))
    prompt = system_prompt("reasoning", wording=DEFAULT_WORDING)
    assert task == Arithmetic(7, -2, style="reasoning", system_prompt=prompt)


def test_the_tasks_of_a_file_take_data(tmp_path):
    path = write(tmp_path / "towns.jsonl", town_rows())
    task = make_task(settings("jsonl", data=path))
    assert (task.name, list(task.files)) == ("jsonl", [path])
    assert "missing.jsonl" in refusal(make_task, settings("gsm8k", data="missing.jsonl"))


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(task_options()["data"].tasks)))
def test_data_is_refused_for_a_task_without_that_option(name):
    line = refusal(make_task, settings(name, data="problems.jsonl"))
    assert f"--task {name} " in line
    assert "--data" in line
    assert "--task gsm8k and jsonl" in line  # the tasks that have it
    assert make_task(settings(name)).name == name  # unless it was not given


def test_a_refused_option_is_spelled_as_on_the_command_line(divisors):
    line = refusal(make_task, settings("arithmetic", word_list="words.txt"))
    assert "--word-list" in line
    assert "--task divisors" in line


def test_an_inheritable_option_of_another_task_is_ignored():
    # A model's card has the options of the task that it was trained on, and may be trained on another.
    assert make_task(settings("reverse", max_operand=99)).name == "reverse"
