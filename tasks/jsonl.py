"""Problems from a file or data set: `--task jsonl --data FILE`, with question and answer, or prompt and response.

    {"question": "What is the capital of France?", "answer": "Paris", "level": "easy"}

The file may be JSON Lines, a JSON array, CSV or Parquet; `--data OWNER/NAME` is a data set of the Hub
(`tasks/common/sources.py`). A column `messages` may hold chats with question and answer instead. If columns have
other names, give `--columns question=NAME`.

A number is compared as a number (1,234 and 1234.0 are equal), any other answer as text. A column `solution` is the
working, which worked examples show before the answer. The user's rewards get all columns. A hash of the question
holds out a tenth for validation and another tenth for test, unless the data set has these splits or
`--validation-data` and `--test-data` name them. If a question has many right answers, `--correct` names a judge:
FILE.py:FUNCTION (`tasks/common/user_file.py`), or the built-in judge choice or math (`tasks/common/judges.py`). The
judge must accept the answer in the file.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated

from tasks.base import Option, Problem
from tasks.common.parsing import PARSERS, parse_answer
from tasks.common.prompts import ideal_completion
from tasks.common.rows import (
    Columns,
    Data,
    Rows,
    TestData,
    ValidationData,
    kind_of,
    kind_of_all,
    notes_on,
    read_splits,
    text_of,
    tolerance_of,
)
from tasks.common.sources import ANSWERS, QUESTIONS, Row
from tasks.common.user_file import Judge


def load(
    data: Data = "",
    style: str = "answer",
    system_prompt: str = "",
    correct: Annotated[
        str, Option("how to judge answers: choice, math, or FILE.py:FUNCTION; default: equality", inheritable=False)
    ] = "",
    validation_data: ValidationData = "",
    test_data: TestData = "",
    columns: Columns = "",
) -> Rows:
    """Load the task from a file or data set. Raises ValueError, in one line, if it is malformed or too small."""
    if not data:
        raise ValueError("--task jsonl needs --data: a file with question and answer, or a data set of the Hub")
    judge = Judge.load(correct) if correct else None
    make = partial(problem_of, style=style, judge=judge)
    problems, by_split, files = read_splits(data, validation_data, test_data, columns, make)
    used = sum(map(len, by_split.values()))
    return Rows(
        name="jsonl",
        problems=by_split,
        files={**files, **(judge.file.files if judge and judge.file else {})},
        judge=judge,
        knows_right=judge is not None,
        style=style,
        kind="text" if judge is not None and judge.reads_text else kind_of_all(problems),
        notes=notes_on(problems, used, compare_answers=judge is None),
        system_prompt=system_prompt,
    )


def problem_of(row: Row, style: str, judge: Judge | None = None) -> Problem:
    """Return the problem in a row. Raises ValueError with the reason if the row has none."""
    question, answer = fields_of(row)
    columns = {name: value for name, value in row.items() if name not in (question, answer)}
    working = row["solution"].strip() if isinstance(row.get("solution"), str) else ""
    problem = Problem(text_of(row, question), text_of(row, answer, or_number=True), columns, working=working)
    problem = replace(problem, tolerance=tolerance_of(row[answer]))
    kind = "text" if judge is not None and judge.reads_text else kind_of(problem.answer)
    gold = PARSERS[kind](problem.answer)
    if gold is None or parse_answer(ideal_completion(problem.answer, style), kind) != gold:
        raise ValueError(f"{answer!r} is a text that cannot be parsed between the tags <answer> and </answer>")
    if judge is not None and not judge(problem, gold):
        raise ValueError(f"--correct {judge.name!r} rejects the {answer!r} in the file, which it must accept")
    return problem


def fields_of(row: Row) -> tuple[str, str]:
    """Return the columns of question and answer: a pair such as prompt and response, or else the first of each."""
    for names in zip(QUESTIONS, ANSWERS, strict=True):
        if row.keys() >= set(names):
            return names
    question = next((name for name in QUESTIONS if name in row), QUESTIONS[0])
    return question, next((name for name in ANSWERS if name in row), ANSWERS[0])
