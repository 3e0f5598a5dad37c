"""What a task is: problems that are split by a hash, prompts for them, and a reading of each completion.

Nothing here or in the other task files imports torch: a task is strings and numbers only, so that a
reward can be read, changed and tested without a model.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

SPLITS = ("train", "validation", "test")
TASKS = ("arithmetic", "gsm8k", "jsonl", "reverse")  # what --task takes; train_grpo.py makes them
KINDS = ("integer", "number", "text")  # of an answer; tasks/parsing.py says what each is

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Answer = int | Decimal | str


@dataclass(frozen=True)
class Problem:
    """One instance of a task: what the user asks, the gold answer, other columns of its row for the rewards."""

    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""  # what accuracy is also reported by, if anything


@dataclass(frozen=True)
class Attempt:
    """A completion as the rewards see it."""

    problem: Problem
    completion: str
    style: str  # of the prompt
    kind: str  # of the answer, one of KINDS
    prompt: Sequence[Message]
    answer: Answer | None  # as parsed; None: not well-formed
    gold: Answer | None  # the problem's own, parsed in the same way

    @property
    def correct(self) -> bool:
        """Whether the answer is exactly right: what the evaluation counts."""
        return self.answer is not None and self.answer == self.gold

    @property
    def well_formed(self) -> bool:
        """Whether an answer of the right kind stands where it was asked for."""
        return self.answer is not None


@dataclass(frozen=True)
class Reward:
    """The score of one completion.

    `total` is the sum of `parts` (each already weighted; None where that function did not apply). Training
    maximises `total`; `correct` and `well_formed` are those of the attempt.
    """

    total: float
    parts: Mapping[str, float | None]
    correct: bool
    well_formed: bool


class Task(Protocol):
    """What the trainer and the evaluation need to know of a task."""

    name: str
    style: str
    kind: str  # of its answers
    system_prompt: str
    default_rewards: Mapping[str, float]  # names and weights
    files: Mapping[str, str]  # SHA-256 of each file that its problems come from

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """The training problem of a place in the run: a pure function of the three numbers."""

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Up to `limit` different problems of 'validation' or 'test', always the same ones."""

    def messages(self, question: str) -> list[Message]:
        """The chat that asks `question`."""

    def judge(self, problem: Problem, completion: str) -> Attempt:
        """Any text whatever as the rewards see it: total, linear in its length, never raises."""


def one_line(error: BaseException) -> str:
    """What an exception says, on one line without control characters: it may quote a model's or a file's text."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:300]


def split_of(key: str) -> str:
    """The split that the problem with this key belongs to: 80% train, 10% validation, 10% test.

    SHA-256 of the text decides, so the split is the same on every machine and in every process
    (Python's own `hash` is salted). Give two spellings of one problem the same key.
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def stream(*names: object) -> random.Random:
    """A random generator that is a function of its names only, on every machine.

    Python seeds from a string with SHA-512, not with the salted `hash`.
    """
    return random.Random("/".join(str(name) for name in names))
