"""The interface of a task: problems split by a hash, prompts for them, and a judgement of each completion.

Nothing here or in the other task files imports torch: a task is strings and numbers only, so that a
reward can be read, changed and tested without a model.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

SPLITS = ("train", "validation", "test")
KINDS = ("integer", "number", "text")  # the kinds of answers, as tasks/common/parsing.py defines them

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Answer = int | Decimal | str


@dataclass(frozen=True)
class Option:
    """Make a parameter of a task an option of train_grpo.py: `max_operand: Annotated[int, Option("…")] = 10`."""

    meaning: str  # the text in --help
    least: float | None = None  # the smallest allowed value
    inheritable: bool = True  # whether a saved model keeps it; False for a file, which no model may name
    common: bool = False  # whether --help lists it; --help-all lists all options


@dataclass(frozen=True)
class Problem:
    """An instance of a task: the question, the gold answer, and further columns for the rewards."""

    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""  # accuracy is reported by category too; in a mixture of tasks, the name of its task
    working: str = ""  # how to get to the answer, if that is known: for worked examples
    place: str = field(default="", compare=False)  # the line of the file that it was read from


@dataclass(frozen=True)
class Attempt:
    """A graded completion, as the rewards see it."""

    problem: Problem
    completion: str
    style: str  # the prompt style
    kind: str  # the kind of the answer, one of KINDS
    prompt: Sequence[Message]
    answer: Answer | None  # the parsed answer; None if the completion gives none of the right kind
    gold: Answer | None  # the problem's own answer, parsed in the same way
    correct: bool  # the task's judgement of the answer, which accuracy counts, whatever the form
    close: bool  # whether the answer is nearly right, by the task's judgement
    well_formed: bool  # whether the completion gives an answer in the form that the prompt asked for


@dataclass(frozen=True)
class Reward:
    """The score of one completion.

    `total`, which training maximises, is the sum of `parts`, each already weighted and None if that function does
    not apply. It is None if none applies: then the completion has no part in its group. `correct` and `well_formed`
    are those of the attempt.
    """

    total: float | None
    parts: Mapping[str, float | None]
    correct: bool
    well_formed: bool


class Task(Protocol):
    """The interface of a task to training and evaluation."""

    name: str
    parts: Mapping[str, "Task"]  # the tasks of a mixture, by name; none for any other task
    style: str
    kind: str  # the kind of its answers, one of KINDS
    system_prompt: str
    examples: Sequence[Message]  # worked examples in each chat, if any
    default_rewards: Mapping[str, float]  # names and weights
    files: Mapping[str, str]  # SHA-256 of each file that its problems come from
    example: str  # a question to try on the trained model
    notes: Sequence[str]  # remarks on the problems, for the start of a run
    hints: Mapping[str, str]  # advice to add to a finding, by the name of the finding
    knows_right: bool  # whether `correct` is right by its word, not only equality with one answer of many

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return the training problem of a row of a step, a pure function of the three numbers."""

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of 'validation' or 'test', always the same ones."""

    def listed(self) -> Iterable[Problem]:
        """Return all problems, if they are not drawn but listed, in a file for instance."""

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question`."""

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade `completion`. Accepts any string, never raises, runs in linear time."""


def chat(question: str, system_prompt: str, examples: Sequence[Message] = ()) -> list[Message]:
    """Return the messages that ask a question, after worked examples as turns if there are any.

    The model's chat template turns them into a prompt.
    """
    return [{"role": "system", "content": system_prompt}, *examples, {"role": "user", "content": question}]


def task_of(task: Task, problem: Problem) -> Task:
    """Return the task that a problem is of: one of a mixture, or else the task itself."""
    return task.parts[problem.category] if task.parts else task


def prompt_of(task: Task, problem: Problem) -> list[Message]:
    """Return the chat that asks a problem as its own task does."""
    return task_of(task, problem).messages(problem.question)


def asked(task: Task) -> dict[str, Any]:
    """Return how a task asks, as a model's card has it; for a mixture also how each of its tasks does."""
    how = {
        "kind": task.kind,
        "prompt_style": task.style,
        "system_prompt": task.system_prompt,
        "examples": list(task.examples),
    }
    return how | ({"tasks": {name: asked(part) for name, part in task.parts.items()}} if task.parts else {})


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line without control characters: it may quote a model or a file."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # a class of the user's may not even have a text
        text = type(error).__name__
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:300]


def shown(value: Any) -> str:
    """Return the beginning of the repr of a value of the user's, or its type if it has none."""
    try:
        return repr(value)[:80]
    except Exception:
        return f"an object of type {type(value).__name__}"


def split_of(key: str) -> str:
    """Return the split of the problem with this key: 80% train, 10% validation, 10% test.

    SHA-256 of the text decides, so the split is the same on every machine and in every process
    (Python's own `hash` is salted). Give two spellings of one problem the same key.
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def seeded_rng(*names: object) -> random.Random:
    """Return a random generator that is a function of its names only, on every machine.

    Python seeds from a string with SHA-512, not with the salted `hash`.
    """
    return random.Random("/".join(str(name) for name in names))
