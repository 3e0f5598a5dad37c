"""The base of a task that makes up its problems: `draw` makes one of any split, a hash of it decides which."""

from abc import abstractmethod
from dataclasses import dataclass
from random import Random

from tasks.base import Problem, seeded_rng, split_of
from tasks.common.qa_task import QATask
from tasks.common.rows import normal

MOST_DRAWS = 10_000  # for one training problem: four of five problems are of that split
DRAWS_EACH = 100  # for each held-out problem, of which a tenth of all are


@dataclass(frozen=True, kw_only=True)
class DrawnTask(QATask):
    """A task (`tasks.base.Task`) with problems as `draw` makes them."""

    name: str

    @abstractmethod
    def draw(self, rng: Random) -> Problem:
        """Return a random problem, by numbers of `rng` only."""

    def key(self, problem: Problem) -> str:
        """Return a text that spellings of the same problem share, so that they are in the same split."""
        return normal(problem.question)

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return the training problem of a row of a step. Raises ValueError if there seems to be none."""
        rng = seeded_rng(self.name, seed, step, row)
        for _ in range(MOST_DRAWS):
            problem = self.draw(rng)
            if split_of(self.key(problem)) == "train":
                return problem
        raise ValueError(f"task {self.name!r} makes so few different problems that none is left to train on")

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of a held-out split, always the same ones."""
        rng, chosen = seeded_rng(self.name, split), {}
        for _ in range(DRAWS_EACH * limit):
            problem = self.draw(rng)
            if split_of(self.key(problem)) == split:
                chosen.setdefault(problem.question, problem)
            if len(chosen) == limit:
                break
        return list(chosen.values())
