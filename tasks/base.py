"""The interface of a task: it makes problems, splits them by a hash, writes their prompts, and grades completions.

No file of tasks/ imports torch: a task handles only strings and numbers, so that a reward can be read, changed and
tested without a model.
"""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar

SPLITS = ("train", "validation", "test")
KINDS = ("integer", "number", "text")  # the kinds of answers, as tasks/common/parsing.py defines them

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Answer = int | Decimal | str


@dataclass(frozen=True)
class Option:
    """Make a parameter of a task an option of train_grpo.py: `max_operand: Annotated[int, Option("…")] = 10`."""

    meaning: str  # the text in --help
    least: float | None = None  # the smallest allowed value
    inheritable: bool = True  # whether a saved model's card keeps the option; False if it is about a user's file
    common: bool = False  # whether --help lists the option; --help-all lists all options


@dataclass(frozen=True)
class Problem:
    """An instance of a task: the question, the gold answer, and further columns for the rewards."""

    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""  # a group of problems with an accuracy of its own; in a mixture, the name of the task
    working: str = ""  # the working that leads to the answer, for worked examples; "" if not known
    tolerance: Decimal = Decimal(0)  # a number is right if it differs from the answer by at most this
    place: str = field(default="", compare=False)  # FILE:LINE that the problem was read from; "" if none


@dataclass(frozen=True)
class Attempt:
    """A graded completion, as the rewards see it."""

    problem: Problem
    completion: str
    kind: str  # the kind of the answer, one of KINDS
    prompt: Sequence[Message]
    answer: Answer | None  # the parsed answer; None if the completion has no answer of the right kind
    gold: Answer | None  # the problem's own answer, parsed in the same way
    correct: bool  # whether the task calls the answer right; accuracy is the share of right answers
    close: bool  # whether the task calls the answer nearly right
    well_formed: bool  # whether the completion gives an answer in the form that the prompt asked for


@dataclass(frozen=True)
class Reward:
    """The score of one completion.

    Training maximises `total`. A completion whose total is None is left out of the comparison within its group.
    """

    total: float | None  # the sum of the parts that apply; None if no reward function applies
    parts: Mapping[str, float | None]  # value times weight, by reward function; None if the function does not apply
    correct: bool  # copied from the `Attempt`
    well_formed: bool  # copied from the `Attempt`
    errors: Sequence[str] = ()  # one line for each function that failed on the completion; then `total` is None


@dataclass(frozen=True, kw_only=True)
class Task:
    """The interface of a task to training and evaluation."""

    name: str
    parts: ClassVar[Mapping[str, "Task"]] = {}  # the tasks of a mixture, by name; empty for any other task
    style: str = "answer"  # the prompt style
    kind: str = "integer"  # the kind of the answers, one of KINDS
    system_prompt: str = ""
    examples: Sequence[Message] = ()  # worked examples, as turns between the system prompt and the question
    opening: str = ""  # "<think>" and white space, if the model's chat template ends each prompt with them
    example: str = "..."  # a question to try on the trained model
    files: Mapping[str, str] = field(default_factory=dict)  # the SHA-256 of each of the task's files, by path
    notes: Sequence[str] = ()  # remarks on the problems, printed at the start of a run
    hints: Mapping[str, str] = field(default_factory=dict)  # advice to add to a finding, by the name of the finding
    knows_right: bool = True  # False if an answer is only compared with the gold answer, though others may be right

    @property
    @abstractmethod
    def default_rewards(self) -> Mapping[str, float]:
        """Return the weights, by name, of the rewards that apply unless --reward is given."""

    @abstractmethod
    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return training problem number `row` of step `step`; it depends only on the three arguments."""

    @abstractmethod
    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of 'validation' or 'test', always the same ones."""

    @abstractmethod
    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade any string, in time linear in its length. Raises only what a user's code raises."""

    def listed(self) -> Iterable[Problem]:
        """Return all problems if the task has a finite list of them, such as a file; otherwise ()."""
        return ()

    def without(self, questions: Set[str]) -> "Task | None":
        """Return the task without the problems that ask these questions; None if it cannot leave them out."""
        return None

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question`."""
        return chat(question, self.system_prompt, self.examples)


def chat(question: str, system_prompt: str, examples: Sequence[Message] = ()) -> list[Message]:
    """Return the messages that ask a question; the model's chat template turns them into a prompt."""
    return [{"role": "system", "content": system_prompt}, *examples, {"role": "user", "content": question}]


def task_of(task: Task, problem: Problem) -> Task:
    """Return the task that a problem belongs to: in a mixture, the task that made it; else `task` itself."""
    return task.parts[problem.category] if task.parts else task


def prompt_of(task: Task, problem: Problem) -> list[Message]:
    """Return the chat that asks a problem, with the prompt of the task that it belongs to."""
    return task_of(task, problem).messages(problem.question)


def asked(task: Task) -> dict[str, Any]:
    """Return the entries of a card that describe a task's prompt; for a mixture, also the prompts of its tasks."""
    how = {
        "kind": task.kind,
        "prompt_style": task.style,
        "system_prompt": task.system_prompt,
        "examples": list(task.examples),
    }
    if task.opening:
        how["opening"] = task.opening
    if task.parts:
        how["tasks"] = {name: asked(part) for name, part in task.parts.items()}
    return how


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception on one line, at most 300 characters.

    Control characters are replaced, because the message may quote a completion or a file.
    """
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # `__str__` of a user's exception may raise
        text = type(error).__name__
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:300]


def shown(value: Any) -> str:
    """Return the first 80 characters of the repr of a value, or its type if its `__repr__` raises."""
    try:
        return repr(value)[:80]
    except Exception:
        return f"an object of type {type(value).__name__}"


def first_few(items: Iterable[object], most: int) -> str:
    """Return the first `most` items, separated by commas, and … if there are more."""
    texts = list(map(str, items))
    return ", ".join(texts[:most]) + ", …" * (len(texts) > most)


def split_of(key: str) -> str:
    """Return the split of the problem with this key: 80% train, 10% validation, 10% test.

    The SHA-256 of the key decides, because it is the same on every machine and in every process; Python's `hash` of a
    text is not. Two spellings of one problem must have the same key.
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def seeded_rng(*names: object) -> random.Random:
    """Return a random generator whose numbers depend only on `names` and are the same on every machine.

    Python seeds from a string with SHA-512, not with the salted `hash`.
    """
    return random.Random("/".join(str(name) for name in names))
