"""Held-out accuracy: greedy, on problems that training never sees, with its confidence interval; and pass@k."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from grpo.greedy import common_beginning
from grpo.intervals import pass_at_k, wilson_interval
from grpo.models import ROWS, LanguageModel, precision
from grpo.sampling import generate, left_pad, token_noise
from tasks.base import Attempt, Problem, Task

SAMPLES = 2  # for each of the k of pass@k: as many again, for less noise
NOT_TRAINING = 10**6  # in the place of `token_noise`'s attempt: training never draws this noise


@dataclass(frozen=True)
class Evaluation:
    """How a model does on some problems."""

    problems: Sequence[Problem]
    attempts: Sequence[Attempt]  # one a problem

    @property
    def n(self) -> int:
        """How many problems."""
        return len(self.problems)

    @cached_property
    def right(self) -> list[bool]:
        """Which are answered exactly right."""
        return [attempt.correct for attempt in self.attempts]

    @property
    def categories(self) -> dict[str, list[bool]]:
        """Which are right in each category of problem that the task names, in order."""
        found: dict[str, list[bool]] = {}
        for problem, right in zip(self.problems, self.right, strict=True):
            if problem.category:
                found.setdefault(problem.category, []).append(right)
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """As the metrics file has it: accuracy, its Wilson 95% interval, well-formed share, accuracy by category."""
        well_formed = sum(attempt.well_formed for attempt in self.attempts) / self.n
        categories = {name: proportion(right) for name, right in self.categories.items()}
        more = {"categories": categories} if categories else {}
        return {**proportion(self.right), "well_formed": well_formed, **more}


def proportion(right: Sequence[bool]) -> dict[str, float | int]:
    """The share that is right, of how many, with its Wilson 95% interval."""
    n, low_high = len(right), wilson_interval(sum(right), len(right))
    return {"accuracy": sum(right) / n, "n": n, "ci_low": low_high[0], "ci_high": low_high[1]}


def evaluate(
    lm: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    limit: int = ROWS,
    prompts: Sequence[Sequence[int]] | None = None,
    together: bool = False,
) -> Evaluation:
    """Answer each problem once, greedily, `limit` of them at a time, and judge it.

    `prompts` are those of the problems, where they are known already; `together` is that of `grpo.greedy`.
    """
    if prompts is None:
        prompts = lm.prompts([task.messages(p.question) for p in problems])
    completions = lm.decode(lm.answer(prompts, max_new_tokens, limit, together))
    return Evaluation(problems, [task.judge(p, text) for p, text in zip(problems, completions, strict=True)])


def sampled_passes(
    lm: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int,
    k: int,
    seed: int,
    limit: int = ROWS,
    together: bool = False,
) -> dict[str, float]:
    """pass@1, pass@2, pass@4, …, pass@k, each the mean over the problems, from 2k samples of each at temperature 1.

    A problem's samples are a function of seed and its place in the list.
    """
    n = SAMPLES * k
    at_once = max(1, limit // n)
    correct: list[int] = []
    for start in range(0, len(problems), at_once):
        some = problems[start : start + at_once]
        places = range(start, start + len(some))
        noise = [token_noise(seed, place, n, max_new_tokens, NOT_TRAINING) for place in places]
        prompts = lm.prompts([task.messages(p.question) for p in some])
        with precision(lm.device):
            completions = generate(
                lm.model,
                *left_pad(prompts, lm.pad_id, lm.device),
                num_generations=n,
                max_new_tokens=max_new_tokens,
                end_ids=lm.end_ids,
                noise=torch.cat(noise),
                beginning=common_beginning(prompts) if together and len(prompts) > 1 else 0,
                limit=limit,
            )
        texts = lm.decode(completions)
        for i, problem in enumerate(some):
            correct.append(sum(task.judge(problem, text).correct for text in texts[i * n : (i + 1) * n]))
    ks = sorted({2**i for i in range(k.bit_length())} | {k})
    return {str(j): fmean(pass_at_k(n, c, j) for c in correct) for j in ks}
