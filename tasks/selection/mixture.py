"""Several tasks as one: `--task arithmetic=0.7 --task countdown=0.3`.

Each problem is of one task, which `Problem.task` names; that task asks, grades and rewards it. Which task a row of a
step takes is drawn by weight, as a function of seed, step and row. Held out are the problems that each task holds
out, in these shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum

from tasks.base import Attempt, Message, Problem, Task, seeded_rng

LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Share:
    """A task as `--task` names it, and its weight; None for a task alone."""

    spec: str  # arithmetic, or FILE.py:NAME
    weight: float | None = None

    @property
    def name(self) -> str:
        """Return what metrics call the task: for one in a file, the NAME."""
        return self.spec.rpartition(":")[2]

    def __str__(self) -> str:
        return self.spec if self.weight is None else f"{self.spec}={self.weight:.12g}"


def parse_shares(specs: str | Sequence[str]) -> list[Share]:
    """Return the tasks that --task names: one, or several of NAME=WEIGHT.

    Raises ValueError, in one line, if a weight is missing or no positive number, or if a task is named twice.
    """
    shares = [_parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    if not shares:
        raise ValueError("--task is empty; give one")
    if len(shares) == 1 and shares[0].weight is not None:
        raise ValueError(f"--task is {specs[0]!r}, alone; a weight is for each of several, --task A=0.7 --task B=0.3")
    if len(shares) > 1:
        for share in shares:
            if share.weight is None:
                raise ValueError(f"--task {share.spec!r} has no weight; with several, each has one: {share.spec}=0.5")
            if not 0 < share.weight <= LARGEST_WEIGHT:
                raise ValueError(
                    f"--task {share.spec!r} has weight {share.weight:g}; it must be above 0 and at most a million"
                )
    names = [share.name for share in shares]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"--task {twice!r} is given twice; its options (such as --data) and metrics go by its name; give it once"
        )
    return shares


def _parse(spec: str) -> Share:
    name, equals, text = spec.rpartition("=")
    if not equals or ":" in text:  # a path may have an = in it
        return Share(spec)
    try:
        return Share(name, float(text))
    except ValueError:
        raise ValueError(f"--task {spec!r}: write NAME=WEIGHT, with a number as weight") from None


@dataclass(frozen=True)
class Mixture:
    """Several tasks as one (`tasks.base.Task`); what is of a task, such as the style, is here that of the first."""

    parts: Mapping[str, Task]  # by name
    weights: Mapping[str, float]

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return the training problem of a row of a step; which task it is of is drawn by weight."""
        [name] = seeded_rng("mixture", seed, step, row).choices(list(self.weights), self.weights.values())
        return replace(self.parts[name].training_problem(seed, step, row), task=name)

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return about `limit` problems in the shares of the tasks; fewer of a task that holds out fewer, but one."""
        total = fsum(self.weights.values())
        found = []
        for name, weight in self.weights.items():
            own = self.parts[name].held_out(split, max(1, round(limit * weight / total)))
            found += [replace(problem, task=name) for problem in own]
        return found

    def listed(self) -> list[Problem]:
        """Return all problems of the tasks that list theirs."""
        return [replace(problem, task=name) for name, part in self.parts.items() for problem in part.listed()]

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question` as one of the first task."""
        return self.first.messages(question)

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade `completion` as the problem's own task does."""
        return self.parts[problem.task].grade(problem, completion)

    @property
    def name(self) -> str:
        """Return the names of the tasks."""
        return " and ".join(self.parts)

    @property
    def first(self) -> Task:
        """Return the task that is named first."""
        return next(iter(self.parts.values()))

    @property
    def style(self) -> str:
        """Return the style of the first task."""
        return self.first.style

    @property
    def kind(self) -> str:
        """Return the kind of the first task's answers."""
        return self.first.kind

    @property
    def system_prompt(self) -> str:
        """Return the system prompt of the first task."""
        return self.first.system_prompt

    @property
    def examples(self) -> Sequence[Message]:
        """Return the worked examples of the first task."""
        return self.first.examples

    @property
    def example(self) -> str:
        """Return the question to try of the first task."""
        return self.first.example

    @property
    def default_rewards(self) -> Mapping[str, float]:
        """Return names and weights of the rewards of all tasks; `rewards_of` applies each where it belongs."""
        return {name: weight for part in self.parts.values() for name, weight in part.default_rewards.items()}

    @property
    def files(self) -> Mapping[str, str]:
        """Return the SHA-256 of each file of a task."""
        return {path: sha256 for part in self.parts.values() for path, sha256 in part.files.items()}

    @property
    def notes(self) -> list[str]:
        """Return the remarks on the problems of each task."""
        return [f"{name}: {note}" for name, part in self.parts.items() for note in part.notes]

    @cached_property
    def hints(self) -> Mapping[str, str]:
        """Return the advice of the tasks: NAME/TASK for a finding on one task, with its name for one on all."""
        found: dict[str, str] = {}
        for name, part in self.parts.items():
            for finding, hint in part.hints.items():
                found[f"{finding}/{name}"] = hint
                found[finding] = f"{found.get(finding, '')} {name}: {hint}".strip()
        return found

    @property
    def knows_right(self) -> bool:
        """Return whether all tasks know what is right by their word."""
        return all(part.knows_right for part in self.parts.values())
