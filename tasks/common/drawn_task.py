"""The base of a task that makes up its problems: `draw` makes a problem, and a hash decides its split."""

from abc import abstractmethod
from dataclasses import dataclass
from random import Random

from tasks.base import Problem, seeded_rng, split_of
from tasks.common.qa_task import QATask
from tasks.common.rows import normal

# If this many draws give no training problem, the task is taken to have none: usually 8 of 10 draws give one.
MAX_DRAWS_FOR_TRAINING = 10_000
# At most this many draws are made for each held-out problem; usually 1 in 10 draws gives one.
DRAWS_PER_HELD_OUT = 100


@dataclass(frozen=True, kw_only=True)
class DrawnTask(QATask):
    """A task (`tasks.base.Task`) whose problems are drawn at random by `draw`."""

    @abstractmethod
    def draw(self, rng: Random) -> Problem:
        """Return a random problem; all its randomness comes from `rng`."""

    def key(self, problem: Problem) -> str:
        """Return a text that is the same for all spellings of a problem, so that they are in one split."""
        return normal(problem.question)

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return training problem number `row` of step `step`. Raises ValueError if none is found."""
        rng = seeded_rng(self.name, seed, step, row)
        for _ in range(MAX_DRAWS_FOR_TRAINING):
            problem = self.draw(rng)
            if split_of(self.key(problem)) == "train":
                return problem
        raise ValueError(f"task {self.name!r} makes so few different problems that none is left to train on")

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of a held-out split, always the same ones."""
        rng = seeded_rng(self.name, split)
        chosen = {}
        for _ in range(DRAWS_PER_HELD_OUT * limit):
            problem = self.draw(rng)
            if split_of(self.key(problem)) == split:
                chosen.setdefault(problem.question, problem)
            if len(chosen) == limit:
                break
        return list(chosen.values())
