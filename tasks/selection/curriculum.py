"""Which problems to train on: those that the policy solves sometimes (`--curriculum`).

A group whose completions are all right or all wrong teaches nothing. How often the policy solves the problems of a
level is estimated from its own rollouts: a Beta posterior that forgets, for the policy changes. Of some candidates
for each place in the batch, the one is taken whose group is most likely to be mixed, at rates drawn from the
posteriors (Thompson sampling, so that what is uncertain is tried too). All is a function of the seed, the step and
the rollouts so far.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tasks.base import Problem, Task, seeded_rng

CANDIDATES = 8  # training problems to choose from for each place
APART = 10**8  # rows between them
FORGETTING = 0.9  # of what is known, what is left a step later
NEGLIGIBLE = 0.05  # completions; a level of which less is remembered is forgotten


@dataclass
class Curriculum:
    """The estimates of a run, and the problems that they choose."""

    task: Task
    num_generations: int
    counts: dict[str, list[float]] = field(default_factory=dict)  # by level: right and wrong, discounted

    def problem(self, seed: int, step: int, row: int) -> Problem:
        """Return the training problem of a row of a step: the candidate whose group is most likely to be mixed."""
        rng = seeded_rng("curriculum", seed, step, row)
        candidates = [self.task.training_problem(seed, step, row + i * APART) for i in range(CANDIDATES)]
        rates = {level: rng.betavariate(*self.posterior(level)) for level in dict.fromkeys(map(level_of, candidates))}
        return max(candidates, key=lambda problem: mixed(rates[level_of(problem)], self.num_generations))

    def posterior(self, level: str) -> tuple[float, float]:
        """Return the parameters of the Beta distribution of a level's solve rate; both are 1 if nothing is known."""
        right, wrong = self.counts.get(level, (0.0, 0.0))
        return 1 + right, 1 + wrong

    def solve_rate(self, level: str) -> float:
        """Return the expected solve rate of a level; 1/2 if nothing is known."""
        right, wrong = self.posterior(level)
        return right / (right + wrong)

    def figures(self, drawn: Sequence[Problem]) -> dict[str, float | None]:
        """Return what the estimates say of the problems drawn for a step, before it is observed.

        `solve_rate` is the mean of their expected solve rates. `level` is the mean place of their levels among those
        seen lately, from 0, the one that is solved most, to 1, the one that is solved least; levels of equal rates
        share a place. Of levels not seen it knows none; it is None if there are not two seen, or none drawn.
        """
        solved = sorted(-self.solve_rate(level) for level in self.counts)
        known = [-self.solve_rate(level) for level in map(level_of, drawn) if level in self.counts]
        places = [(bisect_left(solved, rate) + bisect_right(solved, rate) - 1) / 2 for rate in known]
        return {
            "level": fmean(places) / (len(solved) - 1) if places and len(solved) > 1 else None,
            "solve_rate": fmean(self.solve_rate(level_of(problem)) for problem in drawn),
        }

    def observe(self, sampled: Iterable[tuple[Problem, int, int]]) -> None:
        """Take in a step: each problem with its right and its wrong completions."""
        kept = {level: [n * FORGETTING for n in both] for level, both in self.counts.items()}
        self.counts = {level: both for level, both in kept.items() if sum(both) >= NEGLIGIBLE}
        for problem, right, wrong in sampled:
            both = self.counts.setdefault(level_of(problem), [0.0, 0.0])
            both[0] += right
            both[1] += wrong

    def state_dict(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps, as JSON values."""
        return self.counts

    @staticmethod
    def is_state(value: Any) -> bool:
        """Return whether a value is what `state_dict` returns."""
        return isinstance(value, Mapping) and all(
            isinstance(both, list) and len(both) == 2 and all(isinstance(n, (int, float)) and n >= 0 for n in both)
            for both in value.values()
        )


def level_of(problem: Problem) -> str:
    """Return what a problem's solve rate is known by: its level, or else itself, in its task."""
    level = problem.level or problem.question
    return f"{problem.task}: {level}" if problem.task else level


def mixed(rate: float, num_generations: int) -> float:
    """Return the chance that a group has right and wrong completions, at this solve rate: 1 − pᴳ − (1 − p)ᴳ."""
    return 1 - rate**num_generations - (1 - rate) ** num_generations
