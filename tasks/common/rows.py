"""Tasks over the rows of a file: read JSON Lines, report malformed lines, sample problems.

    {"question": "What is the capital of France?", "answer": "Paris"}

A file is read once, before training starts, line by line; a hash of the question decides the split of a row.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tasks.base import SPLITS, Answer, Problem, seeded_rng, split_of
from tasks.common.parsing import PARSERS, parse_number
from tasks.common.qa_task import QATask
from tasks.common.user_file import Judge

NAMED = 5  # how many malformed lines an error names
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows(QATask):
    """A task whose problems are rows, given by split (`tasks.base.Task`)."""

    name: str
    problems: Mapping[str, Sequence[Problem]]
    files: Mapping[str, str]  # the SHA-256 of each source of the problems, by its name, and of the judge
    judge: Judge | None = None  # decides what is right, instead of equality with the problem's own answer

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Sample the training problem of a row of a step uniformly."""
        train = self.problems["train"]
        return train[seeded_rng(self.name, seed, step, row).randrange(len(train))]

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` problems of a held-out split, no question twice."""
        different = list({normal(problem.question): problem for problem in reversed(self.problems[split])}.values())
        return seeded_rng(self.name, split).sample(different, min(limit, len(different)))

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether a parsed answer is right. Raises ValueError if a judge fails."""
        return super().is_correct(problem, answer) if self.judge is None else self.judge(problem, answer)

    def kind_of(self, problem: Problem) -> str:
        """Return the kind of a problem's answer: a file may hold numbers and texts."""
        return "integer" if self.kind == "integer" else kind_of(problem.answer)


def kind_of(answer: str) -> str:
    """Return the kind of an answer: number or text."""
    return "text" if parse_number(answer) is None else "number"


def kind_of_all(problems: Iterable[Problem]) -> str:
    """Return the most special kind that all answers have: integer, number, or else text."""
    answers = [problem.answer for problem in problems]
    special = ("integer", "number")
    return next((kind for kind in special if all(PARSERS[kind](answer) is not None for answer in answers)), "text")


def normal(question: str) -> str:
    """Return one text for all spellings of a question that differ in case and white space only."""
    return " ".join(question.casefold().split())


def split_rows(problems: Iterable[Problem], source: str) -> dict[str, list[Problem]]:
    """Return the problems by split. Raises ValueError if a split is left without any."""
    of_split: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for problem in problems:
        of_split[split_of(normal(problem.question))].append(problem)
    if missing := [split for split, rows in of_split.items() if not rows]:
        n = sum(map(len, of_split.values()))
        raise ValueError(
            f"{source} has too few problems ({n}): a hash of the question puts a tenth each aside for validation and "
            f"test, and leaves none for {' and '.join(missing)}; provide a few hundred"
        )
    return of_split


def read_rows(path: str, problem_of: Callable[[Row], Problem]) -> tuple[list[Problem], str]:
    """Read the problems in a JSON Lines file; also return the SHA-256 of what was read.

    `problem_of` makes a problem of a row, or raises ValueError with the reason why it cannot. Raises ValueError in
    one line, `file:line: reason` for the first malformed line, with the numbers of some more. Blank lines are
    skipped; a byte order mark and CRLF are fine.
    """
    problems, malformed, digest = [], [], hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    problems.append(problem_of(parse_row(line)))
                except ValueError as error:
                    malformed.append((number, str(error)))
    except (OSError, ValueError) as error:  # a path with a NUL raises a ValueError
        raise ValueError(f"cannot read --data {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if malformed:
        number, reason = malformed[0]
        others = ", ".join(str(n) for n, _ in malformed[1:NAMED])
        if len(malformed) > 1:
            others = f" (and {len(malformed) - 1} more: {others}{', …' * (len(malformed) > NAMED)})"
        raise ValueError(f"{path}:{number}: {reason}{others}")
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
        raise ValueError("a key comes twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"not JSON ({name})")


def text_of(row: Row, field: str, or_number: bool = False) -> str:
    """Return the text of a field without white space around it, and a number as text if `or_number`.

    Raises ValueError with the reason if the field has no such text.
    """
    if field not in row:
        raise ValueError(f"no {field!r}")
    value = row[field]
    if or_number and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) == float("inf"):
            raise ValueError(f"{field!r} is too large a number")
        value = format(Decimal(repr(value)), "f")
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
