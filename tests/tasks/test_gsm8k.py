"""The GSM8K task: right answers, and problems from a file and from the Hub."""

import sys
from types import SimpleNamespace

import pytest

from tasks import gsm8k
from tasks.base import split_of
from tasks.common.prompts import STYLES, ideal_completion, system_prompt
from tasks.common.rows import normal
from tests.helpers.data import GSM8K_ROWS, refusal, write
from tests.helpers.tasks import reward_of


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 72", "72"),
        ("so it is 9.\n#### 18", "18"),
        ("####18", "18"),
        ("#### 18\n", "18"),
        ("#### 1,234", "1234"),
        ("#### 109,200,000", "109200000"),
        ("#### -5", "-5"),
        ("#### $1,018.50", "1018.50"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### +5", "5"),
        ("#### 007", "7"),
        ("#### 5.", "5"),
        ("#### −5", "-5"),  # U+2212
        ("#### 12 500", "12500"),
        ("#### 1 is not it\n#### 2", "2"),
        ("##### 3", "3"),
    ],
)
def test_the_gold_answer_is_the_number_after_the_last_mark(text, gold):
    assert gsm8k.gold_answer(text) == gold


@pytest.mark.parametrize(
    "text",
    [
        *("", "72", "### 72", "####", "#### ", "#### x", "#### 1,23", "#### 5 apples", "#### --5", "#### -$-5"),
        *("#### 5.5.", "#### ٤٢", "#### " + "9" * 5000, "#### nan", "#### 1e5", "#### 1_000", "#### $$5"),
        *("#### 5 ####", "#### –5"),
    ],
    ids=range(19),
)
def test_a_solution_without_a_number_at_its_end_is_refused_in_one_line(text):
    assert refusal(gsm8k.gold_answer, text)


def test_a_file_in_the_published_format_is_a_task_of_integers(tmp_path):
    path = write(tmp_path / "g.jsonl", GSM8K_ROWS)
    task = gsm8k.load(path)
    problems = [problem for rows in task.problems.values() for problem in rows]
    assert len(problems) == len(GSM8K_ROWS) == 80
    assert (task.name, task.kind) == ("gsm8k", "integer")
    assert task.system_prompt == system_prompt("answer", "integer")
    assert list(task.files) == [path]
    for problem in problems:
        a, b = (int(word) for word in problem.question.split() if word.isdigit())
        assert problem.answer == str(a * b)
        assert problem.columns["solution"].endswith(f"#### {a * b:,}")


HUGE = "9" * 5000
NUMBER_HACKS = [
    *("", " ", "3000", "The answer is 3000.", "#### 3000", system_prompt("answer"), "\\boxed{3000}"),
    *("<answer></answer>", "<answer>...</answer>", "<answer>3000", "3000</answer>", "<answer>3000</answer>."),
    *("<answer>3000</answer> apples", "<answer>3000</answer><|im_end|>", "<answer>3000</answer>" * 2),
    *("<answer>1</answer><answer>3000</answer>", "<answer><answer>3000</answer></answer>", "<ANSWER>3000</ANSWER>"),
    *("<answer>3000 or 3001</answer>", "<answer>2999 3000</answer>", "<answer>30,00</answer>"),
    *("<answer>3_000</answer>", "<answer>3e3</answer>", "<answer>12*250</answer>", "<answer>6000/2</answer>"),
    *(
        "<answer>٣٠٠٠</answer>",
        "<answer>３０００</answer>",
        "<answer>3000$$</answer>",
        "<answer>3000 apples or pears or both</answer>",
    ),
    *("<answer>" + "0" * 5000 + "3000</answer>", f"<answer>{HUGE}</answer>", "<answer>nan</answer>"),
    *("<answer>99**98**97</answer>", "<answer>__import__('os').system('true')</answer>", "<answer>2999</answer>"),
    *("<answer>3000.000000001</answer>", "<answer>3000\x00</answer>", "<answer>3000</answer>\ud800"),
    "<reasoning>\n<answer>\n3000\n</answer>\n</reasoning>\n<answer>\n3000\n</answer>\n",
]


@pytest.mark.parametrize("style", STYLES)
def test_every_solution_of_a_file_is_paid_in_full_and_no_hack_is(style, tmp_path):
    task = gsm8k.load(write(tmp_path / "g.jsonl", GSM8K_ROWS), style)
    full = sum(task.default_rewards.values())
    decimals = [*GSM8K_ROWS, {"question": "How much?", "answer": "It is half of it.\n#### $1.50"}]
    assert gsm8k.load(write(tmp_path / "d.jsonl", decimals)).kind == "number"
    for problem in [problem for rows in task.problems.values() for problem in rows]:
        solution = ideal_completion(problem.answer, style, problem.columns["solution"])
        assert reward_of(task, problem, solution).total == full
        assert reward_of(task, problem, ideal_completion(f"{int(problem.answer):,}", style, "x")).total == full
    problem = gsm8k.problem_of(GSM8K_ROWS[-1])
    assert problem.answer == "3000"
    assert len(NUMBER_HACKS) >= 30
    for hack in [*NUMBER_HACKS, problem.question, problem.columns["solution"]]:
        reward = reward_of(task, problem, hack)
        assert reward.total < full, hack
        assert not reward.correct, hack


def test_without_a_file_the_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = refusal(gsm8k.load)
    assert "pip install datasets" in line
    assert "--data" in line


def test_the_test_problems_of_the_hub_stay_the_test_problems(monkeypatch):
    asked = []
    data = {"train": [*GSM8K_ROWS[10:], GSM8K_ROWS[0]], "test": GSM8K_ROWS[:10]}  # the first test problem is in both
    load_dataset = lambda *args: asked.append(args) or data  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = gsm8k.load(style="think")
    assert asked == [("openai/gsm8k", "main")]
    questions = {split: {problem.question for problem in rows} for split, rows in task.problems.items()}
    assert questions["test"] == {row["question"] for row in GSM8K_ROWS[:10]}
    assert not questions["test"] & (questions["train"] | questions["validation"])
    assert questions["validation"] == {
        row["question"] for row in GSM8K_ROWS[10:] if split_of(normal(row["question"])) == "validation"
    }
    assert len(questions["train"]) + len(questions["validation"]) == 70
    before = task.files
    data["train"][3] = {"question": "Something else?", "answer": "#### 5"}
    assert gsm8k.load().files != before  # so that a resumed run notices that the data changed


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("no\nroute to \x1b[2J host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert "--data FILE" in refusal(gsm8k.load)
