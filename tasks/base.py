"""What a task is: problems that are split by a hash, prompts for them, and a score for each completion.

Nothing here or in the other task files imports torch: a task is strings and numbers only, so that a
reward can be read, changed and tested without a model.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Protocol

SPLITS = ("train", "validation", "test")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Problem:
    """One instance of a task: what the user asks, and the gold answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Reward:
    """The score of one completion.

    `total` is the sum of `parts` (each already weighted); `correct` says whether the answer is exactly
    right, `well_formed` whether it stands where it was asked for. Training maximises `total`, the
    evaluation counts `correct`.
    """

    total: float
    parts: dict[str, float]
    correct: bool
    well_formed: bool


class Task(Protocol):
    """What the trainer and the evaluation need to know of a task."""

    name: str
    reward_parts: tuple[str, ...]

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """The training problem of a place in the run: a pure function of the three numbers."""

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Up to `limit` different problems of 'validation' or 'test', always the same ones."""

    def messages(self, question: str) -> list[Message]:
        """The chat that asks `question`."""

    def score(self, problem: Problem, completion: str) -> Reward:
        """The reward of any text whatever: total, linear in its length, never raises."""


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
