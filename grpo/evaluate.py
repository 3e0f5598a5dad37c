"""Held-out accuracy: greedy, on problems that training never sees, with its confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from grpo.models import ROWS, LanguageModel
from tasks.base import Attempt, Problem, Task

Z = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclass(frozen=True)
class Evaluation:
    """How a model does on some problems."""

    problems: Sequence[Problem]
    attempts: Sequence[Attempt]  # one a problem

    @property
    def n(self) -> int:
        """How many problems."""
        return len(self.problems)

    @property
    def correct(self) -> int:
        """How many are answered exactly right."""
        return sum(attempt.correct for attempt in self.attempts)

    @property
    def accuracy(self) -> float:
        """The share that is exactly right."""
        return self.correct / self.n

    def to_dict(self) -> dict[str, float | int]:
        """As the metrics file has it: accuracy, its Wilson 95% interval, the well-formed share."""
        low, high = wilson_interval(self.correct, self.n)
        well_formed = sum(attempt.well_formed for attempt in self.attempts) / self.n
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "ci_low": low,
            "ci_high": high,
            "well_formed": well_formed,
        }


def evaluate(
    lm: LanguageModel, task: Task, problems: Sequence[Problem], max_new_tokens: int, limit: int = ROWS
) -> Evaluation:
    """Answer each problem once, greedily, `limit` of them at a time, and judge it."""
    completions = lm.greedy([task.messages(p.question) for p in problems], max_new_tokens, limit)
    return Evaluation(problems, [task.judge(p, text) for p, text in zip(problems, completions, strict=True)])


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The Wilson 95% interval of a proportion, which stays inside [0, 1] and is right near its ends.

    E. B. Wilson (1927), J. Am. Stat. Assoc. 22, 209.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes in {n} trials is not a proportion")
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
