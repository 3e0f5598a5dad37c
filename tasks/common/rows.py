"""Tasks whose problems are the rows of a file or data set: make problems, report malformed rows, sample problems.

    {"question": "What is the capital of France?", "answer": "Paris"}

The rows are read once (`tasks/common/sources.py`), before training starts. A hash of the question decides the split
of a row, unless the data have splits.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from typing import Annotated, Any

from tasks.base import SPLITS, Answer, Option, Problem, first_few, seeded_rng, split_of
from tasks.common.judges import same_text
from tasks.common.parsing import PARSERS, parse_number
from tasks.common.qa_task import QATask
from tasks.common.sources import (
    WHOLE,
    Row,
    file_sha256,
    names_of,
    parse_columns,
    read_source,
    renamed,
    with_plain_texts,
)
from tasks.common.user_file import Judge

LINES_NAMED = 5  # the largest number of lines that an error or a remark names
MAX_DECIMALS = 9  # tasks/common/parsing.py reads no number with more decimals
# If the right answer is a computed number, such as 0.3333333333333333, an answer may differ by at most these.
RELATIVE_TOLERANCE = Decimal("0.001")  # as a share of the right answer
MAX_TOLERANCE = Decimal("0.005")
ODD_SHARE = 0.1  # If at least this share of the answers matches _ODD, a note says how texts are compared.
_ODD = re.compile(r"[\W\d]|\w\W?$")  # matches the beginning of a text that people write in several ways

# The options of the tasks with rows.
Data = Annotated[
    str,
    Option(
        "problem file (.jsonl, .json, .csv, .parquet), or OWNER/NAME of a data set on the Hub",
        inheritable=False,
        common=True,
    ),
]
ValidationData = Annotated[str, Option("problems for validation, instead of a tenth of --data", inheritable=False)]
TestData = Annotated[str, Option("problems for the test, instead of a tenth of --data", inheritable=False)]
Columns = Annotated[
    str, Option("names of columns in the data, such as question=problem,answer=solution", inheritable=False)
]


@dataclass(frozen=True, kw_only=True)
class Rows(QATask):
    """A task whose problems are the rows of a file or data set (`tasks.base.Task`)."""

    problems: Mapping[str, Sequence[Problem]]  # the problems of each split, by the split's name
    files: Mapping[str, str]  # the SHA-256 of each source of problems and of the judge's file, by path
    judge: Judge | None = None  # decides which answers are right; None: an answer must equal the problem's own

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return training problem number `row` of step `step`, drawn uniformly from the training split."""
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


def notes_on(problems: Sequence[Problem], used: int, compare_answers: bool = True) -> list[str]:
    """Return remarks on rows that may be mistakes; `used` is the number of problems in the splits.

    Remarks name problems that are left out, system prompts in the data, and a minority of answers that decides the
    task's kind. With `compare_answers`, they also name questions that occur again with another answer, and say how
    texts and computed numbers are compared.
    """
    notes = []
    if used < len(problems):
        notes.append(
            f"{len(problems) - used} problems are left out of training or validation: their questions are also in "
            "the data for the test or for validation."
        )
    if systems := sum("system" in problem.columns for problem in problems):
        notes.append(f"{systems} problems have a system prompt of their own, which is not used; see --system-prompt.")
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
            notes.append(f"A question occurs again with another answer in {count}: {first_few(lines, LINES_NAMED)}.")
        odd = [p for p in problems if kind_of(p.answer) == "text" and _ODD.match(p.answer)]
        if odd and len(odd) >= ODD_SHARE * len(problems):
            notes.append(
                f"{len(odd)} of {len(problems)} answers are texts that begin with a digit or a sign, or single "
                f"letters, such as {odd[0].answer[:20]!a}. They are compared as texts, without marks around them; "
                "1/2 equals 2/4, 42 equals 42 km, B equals (B). --correct choice compares only letters, "
                "--correct math compares values, and --correct FILE.py:FUNCTION is a judge of your own."
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


def split_rows(given: Mapping[str, Sequence[Problem]], source: str) -> dict[str, list[Problem]]:
    """Return the problems by split. Raises ValueError if a split is left without problems.

    `given` has the problems of the splits that are in the data. For any other split, a hash of the question chooses
    problems of "train". A question of "test" is left out of the other splits, and a question of "validation" is left
    out of "train".
    """
    hashed = [split for split in SPLITS if split not in given]
    by_split: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    questions: Counter[str] = Counter()
    held_out: set[str] = set()
    for split in reversed(SPLITS):  # test, validation, train
        asked = [(normal(problem.question), problem) for problem in given.get(split, ())]
        for question, problem in asked:
            if question not in held_out:
                by_hash = split_of(question)
                by_split[by_hash if split == "train" and by_hash in hashed else split].append(problem)
        held_out |= {question for question, _ in asked}
        if split == "train":
            questions.update(question for question, _ in asked)
    if missing := [split for split, rows in by_split.items() if not rows]:
        if empty := [split for split in missing if split in given and split != "train"]:
            raise ValueError(f"{source}: there are no problems for {empty[0]} that are not in another split too")
        total = questions.total()
        few = f"too few problems ({total})"
        if len(questions) < total:
            question, times = questions.most_common(1)[0]
            repeated = f"{question[:60]!a} occurs {times} times"
            few = f"too few different questions: {len(questions)} in {total} rows; {repeated}"
        if not hashed:
            raise ValueError(
                f"{source}, without the problems that are in the data for validation or test too, has {few}"
            )
        raise ValueError(
            f"{source} has {few}. A hash of the question puts a tenth into validation and a tenth into test; "
            f"it leaves none for {' and '.join(missing)}. Provide a few hundred different questions"
        )
    return by_split


def read_splits(
    data: str, validation_data: str, test_data: str, columns: str, problem_of: Callable[[Row], Problem]
) -> tuple[list[Problem], dict[str, list[Problem]], dict[str, str]]:
    """Read a task's problems; return all of them, the problems by split, and the SHA-256 of each source.

    The arguments are the values of the options --data, --validation-data, --test-data and --columns. `problem_of`
    makes a problem from a row, or raises ValueError with the reason. Raises ValueError, in one line, if a source
    cannot be read, is malformed or is too small.
    """
    names = parse_columns(columns)
    given, sha256 = read_rows(data, problem_of, names)
    files = {data: sha256}
    given = {split or "train": problems for split, problems in given.items()}
    for split, source in (("validation", validation_data), ("test", test_data)):
        if source:
            found, files[source] = read_rows(source, problem_of, names, f"--{split}-data")
            if split not in found and WHOLE not in found:
                raise ValueError(f"--{split}-data {source!r} has no split that is named {split}")
            given[split] = found.get(split, found.get(WHOLE))
    return list(chain.from_iterable(given.values())), split_rows(given, data), files


def read_rows(
    source: str,
    problem_of: Callable[[Row], Problem],
    columns: Mapping[str, str] | None = None,
    option: str = "--data",
) -> tuple[dict[str, list[Problem]], str]:
    """Return the problems of a file or of a data set of the Hub, by split, and the SHA-256 of what was read.

    A file has the split WHOLE. `columns` maps names that the tasks use to names of columns in the data. Raises
    ValueError, in one line: `place: reason` for the first malformed row, then the numbers of a few more such rows.
    """
    problems: dict[str, list[Problem]] = {}
    try:
        splits, sha256 = read_source(source)
        for split, (prefix, rows) in splits.items():
            malformed: list[tuple[int, str]] = []  # the number of the row and the reason
            problems[split] = []
            for number, row in rows:
                try:
                    if isinstance(row, ValueError):
                        raise row
                    problem = problem_of(with_plain_texts(renamed(row, columns or {})))
                except ValueError as error:
                    malformed.append((number, str(error)))
                else:
                    problems[split].append(replace(problem, place=f"{prefix}{number}"))
            if malformed:
                break
        sha256 = sha256 or file_sha256(source)
    except (OSError, ValueError) as error:  # a path with a NUL raises a ValueError
        raise ValueError(f"cannot read {option} {source!r}: {getattr(error, 'strerror', None) or error}") from None
    if malformed:
        number, reason = malformed[0]
        more = ""
        if len(malformed) > 1:
            numbers = first_few((n for n, _ in malformed[1:]), LINES_NAMED - 1)
            more = f" (and {len(malformed) - 1} more: {numbers})"
        raise ValueError(f"{prefix}{number}: {reason}{more}")
    return problems, sha256


def rounded(value: float) -> str | None:
    """Return a computed number, such as 1/3, as text with four significant digits or more; None for any other number.

    A computed number has more decimals than an answer may have. A number that rounds to 0 at 9 decimals gives None.
    """
    if Decimal(repr(value)).as_tuple().exponent >= -MAX_DECIMALS or round(value, MAX_DECIMALS) == 0:
        return None
    digits = max(4, 3 - math.floor(math.log10(abs(value))))
    return format(round(Decimal(repr(value)), min(digits, MAX_DECIMALS)), "f")


def tolerance_of(value: Any) -> Decimal:
    """Return how much an answer may differ from a row's answer; 0 unless the row's answer is a computed number."""
    if not isinstance(value, float) or (text := rounded(value)) is None:
        return Decimal(0)
    return min(RELATIVE_TOLERANCE * abs(Decimal(text)), MAX_TOLERANCE)


def text_of(row: Row, field: str, or_number: bool = False) -> str:
    """Return the text of a field without white space around it; with `or_number`, also a number as text.

    Raises ValueError with the reason if the field has no text.
    """
    if field not in row:
        raise ValueError(f"no {field!r}; {names_of(row)}; name the right one by --columns {field}=NAME")
    value = row[field]
    if value is None:
        raise ValueError(f"{field!r} is empty")
    if or_number and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if value != value:
            raise ValueError(f"{field!r} is not a number")
        if abs(value) == float("inf"):
            raise ValueError(f"{field!r} is too large a number")
        value = (rounded(value) if isinstance(value, float) else None) or format(Decimal(str(value)), "f")
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
