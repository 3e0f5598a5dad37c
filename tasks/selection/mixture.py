"""Several tasks as one: `--task arithmetic=0.7 --task countdown=0.3`.

Each problem belongs to one task, which asks, grades and rewards the problem; its category is the name of that task.
For each problem of a step, a task is drawn by weight, as a function of seed, step and the problem's place in the
step. Held-out problems come from all tasks in the same shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum

from tasks.base import Attempt, Message, Problem, Task, seeded_rng
from tasks.common.qa_task import QATask

LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Share:
    """A task and its weight, as one `--task` gives them."""

    spec: str  # arithmetic, or FILE.py:NAME
    weight: float | None = None  # None for a single task

    @property
    def name(self) -> str:
        """Return the name of the task in the metrics; for FILE.py:NAME, it is NAME."""
        return self.spec.rpartition(":")[2]

    def __str__(self) -> str:
        return self.spec if self.weight is None else f"{self.spec}={self.weight:.12g}"


def parse_shares(specs: str | Sequence[str]) -> list[Share]:
    """Return the tasks that --task names: a single task, or several, each as NAME=WEIGHT.

    Raises ValueError, in one line, if a weight is missing or not a positive number, or if a task is named twice.
    """
    shares = [_parse(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    if not shares:
        raise ValueError("--task is empty; name a task")
    if len(shares) == 1 and shares[0].weight is not None:
        raise ValueError(
            f"--task is {specs[0]!r}; a single task needs no weight, only several do: --task A=0.7 --task B=0.3"
        )
    if len(shares) > 1:
        for share in shares:
            if share.weight is None:
                raise ValueError(f"--task {share.spec!r} has no weight; each task needs one: {share.spec}=0.5")
            if not 0 < share.weight <= LARGEST_WEIGHT:
                raise ValueError(
                    f"--task {share.spec!r} has weight {share.weight:g}; it must be above 0 and at most a million"
                )
    names = [share.name for share in shares]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"--task {twice!r} is given twice; its options (such as --data) and metrics would clash; give it once"
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


@dataclass(frozen=True, kw_only=True)
class Mixture(QATask):
    """Several tasks as one. A field that cannot differ by problem, such as the style, has the first task's value."""

    parts: Mapping[str, Task] = field()  # tasks by name; `field()` makes it required, unlike in the base class
    weights: Mapping[str, float]  # the weight of each task, by the task's name

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return training problem number `row` of step `step`, from a task that is drawn by weight."""
        [name] = seeded_rng("mixture", seed, step, row).choices(list(self.weights), self.weights.values())
        return replace(self.parts[name].training_problem(seed, step, row), category=name)

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return about `limit` problems, divided among the tasks by weight, with at least one problem of each task.

        If a task has fewer held-out problems than its share, all its problems are returned.
        """
        total = fsum(self.weights.values())
        problems = []
        for name, weight in self.weights.items():
            of_task = self.parts[name].held_out(split, max(1, round(limit * weight / total)))
            problems += [replace(problem, category=name) for problem in of_task]
        return problems

    def listed(self) -> list[Problem]:
        """Return all problems of the tasks that list them."""
        return [replace(problem, category=name) for name, part in self.parts.items() for problem in part.listed()]

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question` with the first task's prompt."""
        return next(iter(self.parts.values())).messages(question)

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade `completion` as the problem's task does, and add a column `task` for rewards in a file."""
        attempt = self.parts[problem.category].grade(problem, completion)
        return replace(attempt, problem=replace(problem, columns={"task": problem.category, **problem.columns}))


def mixture_of(parts: Mapping[str, Task], weights: Mapping[str, float]) -> Mixture:
    """Return the mixture of several tasks; `parts` and `weights` have the task's name as key."""
    first = next(iter(parts.values()))
    hints: dict[str, str] = {}
    for name, part in parts.items():
        for finding, hint in part.hints.items():
            hints[finding] = f"{hints.get(finding, '')} {name}: {hint}".strip()
    return Mixture(
        name=" and ".join(parts),
        parts=parts,
        weights=weights,
        style=first.style,
        kind=first.kind,
        system_prompt=first.system_prompt,
        examples=first.examples,
        example=first.example,
        hints=hints,
        files={path: sha256 for part in parts.values() for path, sha256 in part.files.items()},
        knows_right=all(part.knows_right for part in parts.values()),
        notes=[f"{name}: {note}" for name, part in parts.items() for note in part.notes],
    )
