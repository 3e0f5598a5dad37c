"""Problems from a file: `--task jsonl --data FILE`, JSON Lines with question and answer, or prompt and response.

    {"question": "What is the capital of France?", "answer": "Paris", "level": "easy"}

An answer that is a number is compared as a number (1,234 and 1234.0 are the same), any other as text. A column
`solution` is the working that stands before the answer in worked examples. All columns but question and answer go to
the user's rewards. A hash of the question holds out a tenth for validation and another tenth for test. If a question
has many right answers, `--correct FILE.py:FUNCTION` judges them (`tasks/common/user_file.py`), or a ready judge,
`--correct choice` or `--correct math` (`tasks/common/judges.py`); the answer in the file must be one of them.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated

from tasks.base import Option, Problem
from tasks.common.parsing import PARSERS, parse_answer
from tasks.common.prompts import ideal_completion
from tasks.common.rows import Row, Rows, kind_of, kind_of_all, notes_on, read_rows, split_rows, text_of, tolerance_of
from tasks.common.user_file import Judge

FIELDS = (("question", "answer"), ("prompt", "response"))


def load(
    data: Annotated[str, Option("JSON Lines file with the problems", inheritable=False)] = "",
    style: str = "answer",
    system_prompt: str = "",
    correct: Annotated[
        str, Option("choice, math, or FILE.py:FUNCTION that judges answers, instead of equality", inheritable=False)
    ] = "",
) -> Rows:
    """Load the task from a file. Raises ValueError, in one line, if the file is malformed or too small."""
    if not data:
        raise ValueError("--task jsonl needs --data FILE: JSON Lines with question and answer")
    judge = Judge.load(correct) if correct else None
    problems, sha256 = read_rows(data, partial(problem_of, style=style, judge=judge))
    return Rows(
        name="jsonl",
        problems=split_rows(problems, data),
        files={data: sha256, **(judge.file.files if judge and judge.file else {})},
        judge=judge,
        knows_right=judge is not None,
        style=style,
        kind="text" if judge is not None and judge.reads_text else kind_of_all(problems),
        notes=notes_on(problems, compare_answers=judge is None),
        system_prompt=system_prompt,
    )


def problem_of(row: Row, style: str, judge: Judge | None = None) -> Problem:
    """Return the problem in a row. Raises ValueError with the reason if the row has none."""
    question, answer = next((pair for pair in FIELDS if pair[0] in row), FIELDS[0])
    columns = {name: value for name, value in row.items() if name not in (question, answer)}
    working = row["solution"].strip() if isinstance(row.get("solution"), str) else ""
    problem = Problem(text_of(row, question), text_of(row, answer, or_number=True), columns, working=working)
    problem = replace(problem, tolerance=tolerance_of(row[answer]))
    kind = "text" if judge is not None and judge.reads_text else kind_of(problem.answer)
    gold = PARSERS[kind](problem.answer)
    if gold is None or parse_answer(ideal_completion(problem.answer, style), kind) != gold:
        raise ValueError(f"{answer!r} is a text that cannot be parsed between the tags <answer> and </answer>")
    if judge is not None and not judge(problem, gold):
        raise ValueError(f"--correct {judge.name!r} rejects the {answer!r} in the file; it must accept that")
    return problem
