"""Tasks whose problems are the rows of a file: read JSON Lines, report malformed lines, sample problems.

    {"question": "What is the capital of France?", "answer": "Paris"}

A file is read once, line by line, before training starts. A hash of the question decides the split of a row.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from typing import Any

from tasks.base import SPLITS, Answer, Problem, first_few, seeded_rng, split_of
from tasks.common.judges import same_text
from tasks.common.parsing import PARSERS, parse_number
from tasks.common.qa_task import QATask
from tasks.common.user_file import Judge

LINES_NAMED = 5  # the largest number of lines that an error or a remark names
MAX_DECIMALS = 9  # of a number; tasks/common/parsing.py reads no more
RELATIVE_TOLERANCE = Decimal("0.001")  # of an answer that is a computed number, such as 0.3333333333333333
MAX_TOLERANCE = Decimal("0.005")  # of such an answer
ODD_SHARE = 0.1  # of the answers, from which on the start says how they are compared
_ODD = re.compile(r"[\W\d]|\w\W?$")  # matches the beginning of a text that people write in several ways
MAX_LINE_BYTES = 32 * 2**20  # a longer line would fill the memory
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows(QATask):
    """A task whose problems are rows (`tasks.base.Task`)."""

    problems: Mapping[str, Sequence[Problem]]  # the problems of each split, by the split's name
    files: Mapping[str, str]  # the SHA-256 of the source of the problems and of the judge's file, by path
    judge: Judge | None = None  # decides which answers are right; None: an answer must equal the problem's own

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Sample the training problem of a row of a step uniformly."""
        train = self.problems["train"]
        return train[seeded_rng(self.name, seed, step, row).randrange(len(train))]

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` problems of a held-out split; no question occurs twice."""
        different = list({normal(problem.question): problem for problem in reversed(self.problems[split])}.values())
        return seeded_rng(self.name, split).sample(different, min(limit, len(different)))

    def listed(self) -> Iterable[Problem]:
        """Return all problems."""
        return chain.from_iterable(self.problems.values())

    def without(self, questions: Set[str]) -> "Rows | None":
        """Return the task without the problems that ask these questions; None if a split would be left empty."""
        problems = {
            split: [problem for problem in rows if problem.question not in questions]
            for split, rows in self.problems.items()
        }
        return replace(self, problems=problems) if all(problems.values()) else None

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether a parsed answer is right. Raises ValueError if the judge fails."""
        if self.judge is not None:
            return self.judge(problem, answer)
        return super().is_correct(problem, answer) or (isinstance(answer, str) and same_text(answer, problem.answer))

    def kind_of(self, problem: Problem) -> str:
        """Return the kind of a problem's answer; a file may hold numbers and texts."""
        if self.kind == "integer" or (self.judge is not None and self.judge.reads_text):
            return self.kind
        return kind_of(problem.answer)


def kind_of(answer: str) -> str:
    """Return the kind of an answer: number or text."""
    return "text" if parse_number(answer) is None else "number"


def kind_of_all(problems: Iterable[Problem]) -> str:
    """Return the kind of a task with these problems: integer or number if all answers are of that kind, else text."""
    answers = [problem.answer for problem in problems]
    for kind in ("integer", "number"):
        if all(PARSERS[kind](answer) is not None for answer in answers):
            return kind
    return "text"


def notes_on(problems: Sequence[Problem], compare_answers: bool = True) -> list[str]:
    """Return remarks on lines of a file that may be mistakes.

    One remark is about a minority of answers that decides the kind of all answers. The others, if `compare_answers`,
    are about questions that occur again with another answer, and about how texts and computed numbers are compared.
    """
    notes = []
    task_kind = kind_of_all(problems)
    for kind in ("integer", "number"):
        others = [problem for problem in problems if PARSERS[kind](problem.answer) is None]
        if 0 < len(others) < len(problems) / 2:
            lines = first_few((f"{p.place} {p.answer[:20]!a}" for p in others), LINES_NAMED)
            count = f"{len(others)} of {len(problems)} answers"
            notes.append(f"The kind of the answers is {task_kind}, not {kind}, because of {count}: {lines}.")
            break
    if compare_answers:
        first: dict[str, Problem] = {}  # the first problem with each question
        pairs = [(first.setdefault(normal(problem.question), problem), problem) for problem in problems]
        if differing := [(before, again) for before, again in pairs if _gold(before) != _gold(again)]:
            lines = (
                f"{again.place} {again.answer[:20]!a} (before: {before.place} {before.answer[:20]!a})"
                for before, again in differing
            )
            count = f"{len(differing)} lines"
            notes.append(f"Questions asked again with another answer, in {count}: {first_few(lines, LINES_NAMED)}.")
        odd = [p for p in problems if kind_of(p.answer) == "text" and _ODD.match(p.answer)]
        if odd and len(odd) >= ODD_SHARE * len(problems):
            notes.append(
                f"{len(odd)} of {len(problems)} answers are texts that begin with a digit or a sign, or single "
                f"letters, such as {odd[0].answer[:20]!a}. They are compared as texts, without marks around them; "
                "1/2 equals 2/4, 42 equals 42 km, B equals (B). --correct choice compares letters only, "
                "--correct math values, --correct FILE.py:FUNCTION as you define it."
            )
        if computed := [problem for problem in problems if problem.tolerance]:
            notes.append(
                f"{len(computed)} of {len(problems)} answers are numbers with more than {MAX_DECIMALS} decimals, "
                f"such as {computed[0].answer}. They are rounded, and an answer is right if it differs by at "
                f"most {RELATIVE_TOLERANCE:.1%} and at most {MAX_TOLERANCE}."
            )
    return notes


def _gold(problem: Problem) -> Answer | None:
    return PARSERS[kind_of(problem.answer)](problem.answer)


def normal(question: str) -> str:
    """Return a question in lower case with single spaces: the same text for spellings that differ only in these."""
    return " ".join(question.casefold().split())


def split_rows(problems: Iterable[Problem], source: str) -> dict[str, list[Problem]]:
    """Return the problems by split. Raises ValueError if a split is left without problems."""
    by_split: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    questions: Counter[str] = Counter()
    for problem in problems:
        question = normal(problem.question)
        questions[question] += 1
        by_split[split_of(question)].append(problem)
    if missing := [split for split, rows in by_split.items() if not rows]:
        total = questions.total()
        few = f"too few problems ({total})"
        if len(questions) < total:
            question, times = questions.most_common(1)[0]
            repeated = f"{question[:60]!a} occurs {times} times"
            few = f"too few different questions: {len(questions)} in {total} rows; {repeated}"
        raise ValueError(
            f"{source} has {few}. A hash of the question puts a tenth into validation and a tenth into test; "
            f"it leaves none for {' and '.join(missing)}. Provide a few hundred different questions"
        )
    return by_split


def read_rows(path: str, problem_of: Callable[[Row], Problem]) -> tuple[list[Problem], str]:
    """Read the problems in a JSON Lines file; also return the SHA-256 of what was read.

    `problem_of` makes a problem from a row, or raises ValueError with the reason. This function raises ValueError, in
    one line: `file:line: reason` for the first malformed line, then the numbers of a few more malformed lines. Blank
    lines are skipped; a byte order mark and CRLF are allowed.
    """
    problems: list[Problem] = []
    malformed: list[tuple[int, str]] = []  # line number and reason
    digest = hashlib.sha256()
    try:
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError("it is not a file; a pipe or a device may never end")
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                digest.update(line)
                if len(line) > MAX_LINE_BYTES:
                    malformed.append((number, f"the line has more than {MAX_LINE_BYTES // 2**20} MB"))
                    break
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    problem = problem_of(parse_row(line))
                except ValueError as error:
                    malformed.append((number, str(error)))
                else:
                    problems.append(replace(problem, place=f"{path}:{number}"))
    except (OSError, ValueError) as error:  # a path with a NUL raises a ValueError
        raise ValueError(f"cannot read --data {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if malformed:
        number, reason = malformed[0]
        more = ""
        if len(malformed) > 1:
            numbers = first_few((n for n, _ in malformed[1:]), LINES_NAMED - 1)
            more = f" (and {len(malformed) - 1} more: {numbers})"
        raise ValueError(f"{path}:{number}: {reason}{more}")
    return problems, digest.hexdigest()


def parse_row(line: bytes) -> Row:
    """Parse the JSON object in a line. Raises ValueError with the reason if there is none."""
    if b"\0" in line:
        raise ValueError("the line has a NUL character")
    try:
        row = json.loads(line.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"not JSON ({name})")


def rounded(value: float) -> str | None:
    """Return a computed number, such as 1/3, as text with four significant digits or more; None for any other number.

    Such numbers have more decimals than an answer may have. Numbers too small for 9 decimals stay as they are.
    """
    if Decimal(repr(value)).as_tuple().exponent >= -MAX_DECIMALS or round(value, MAX_DECIMALS) == 0:
        return None
    digits = max(4, 3 - math.floor(math.log10(abs(value))))
    return format(round(Decimal(repr(value)), min(digits, MAX_DECIMALS)), "f")


def tolerance_of(value: Any) -> Decimal:
    """Return by how much an answer may differ from the answer in a row; 0 unless that is a computed number."""
    if not isinstance(value, float) or (text := rounded(value)) is None:
        return Decimal(0)
    return min(RELATIVE_TOLERANCE * abs(Decimal(text)), MAX_TOLERANCE)


def text_of(row: Row, field: str, or_number: bool = False) -> str:
    """Return the text of a field without white space around it; with `or_number`, also a number as text.

    Raises ValueError with the reason if the field has no text.
    """
    if field not in row:
        raise ValueError(f"no {field!r}")
    value = row[field]
    if or_number and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) == float("inf"):
            raise ValueError(f"{field!r} is too large a number")
        value = (rounded(value) if isinstance(value, float) else None) or format(Decimal(repr(value)), "f")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {type(value).__name__}, not text")
    value = value.strip()
    if not value:
        raise ValueError(f"{field!r} is empty")
    if "\0" in value:
        raise ValueError(f"{field!r} has a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{field!r} has half a surrogate pair, which is not valid Unicode")
    return value
