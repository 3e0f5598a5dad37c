"""Tasks over the rows of a file: read JSON Lines, report malformed lines, sample problems.

    {"question": "What is the capital of France?", "answer": "Paris"}

A file is read once, before training starts, line by line; a hash of the question decides the split of a row.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from typing import Any

from tasks.base import SPLITS, Answer, Problem, seeded_rng, split_of
from tasks.common.parsing import PARSERS, parse_number
from tasks.common.qa_task import QATask
from tasks.common.user_file import Judge

NAMED = 5  # how many lines an error or a remark names
MOST_BYTES = 32 * 2**20  # of a line
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

    def listed(self) -> Iterable[Problem]:
        """Return all problems."""
        return chain.from_iterable(self.problems.values())

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


def notes_on(problems: Sequence[Problem], compare_answers: bool = True) -> list[str]:
    """Return remarks on problems that a file may not be meant to have, with the lines.

    That is few answers that decide the kind of all, and, if `compare_answers`, one question with several answers.
    """
    notes = []
    for kind, found in (("integer", "number"), ("integer", "text"), ("number", "text")):
        others = [problem for problem in problems if PARSERS[kind](problem.answer) is None]
        if kind_of_all(problems) == found and 0 < len(others) < len(problems) / 2:
            shown = ", ".join(f"{problem.place} {problem.answer[:20]!a}" for problem in others[:NAMED])
            more = ", …" * (len(others) > NAMED)
            few = f"{len(others)} of {len(problems)}"
            notes.append(f"The kind of the answers is {found}, not {kind}, because of {few}: {shown}{more}.")
            break
    first: dict[str, Problem] = {}
    if compare_answers:
        pairs = [(first.setdefault(normal(problem.question), problem), problem) for problem in problems]
        if differing := [pair for pair in pairs if _gold(pair[0]) != _gold(pair[1])]:
            shown = ", ".join(
                f"{again.place} {again.answer[:20]!a} (before: {before.place} {before.answer[:20]!a})"
                for before, again in differing[:NAMED]
            )
            more = ", …" * (len(differing) > NAMED)
            notes.append(f"Asked again with another answer, in {len(differing)} lines: {shown}{more}.")
    return notes


def _gold(problem: Problem) -> Answer | None:
    return PARSERS[kind_of(problem.answer)](problem.answer)


def normal(question: str) -> str:
    """Return one text for all spellings of a question that differ in case and white space only."""
    return " ".join(question.casefold().split())


def split_rows(problems: Iterable[Problem], source: str) -> dict[str, list[Problem]]:
    """Return the problems by split. Raises ValueError if a split is left without any."""
    of_split: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for problem in problems:
        of_split[split_of(normal(problem.question))].append(problem)
    if missing := [split for split, rows in of_split.items() if not rows]:
        asked = Counter(normal(problem.question) for rows in of_split.values() for problem in rows)
        n = asked.total()
        if len(asked) < n:
            question, times = asked.most_common(1)[0]
            raise ValueError(
                f"{source} has too few different questions: {len(asked)} in {n} rows; {question[:60]!a} comes "
                f"{times} times. A hash of the question puts a tenth each aside for validation and test, and leaves "
                f"none for {' and '.join(missing)}; provide a few hundred different ones"
            )
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
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError("it is no file; a pipe or a device may never end")
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1):
                digest.update(line)
                if len(line) > MOST_BYTES:
                    malformed.append((number, f"the line has more than {MOST_BYTES // 2**20} MB"))
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
