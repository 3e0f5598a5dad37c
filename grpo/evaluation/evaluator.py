"""Held-out accuracy with its confidence interval, greedy, on problems that training never sees; pass@k and maj@k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from grpo.config import TrainConfig
from grpo.evaluation.drift import DriftBaseline
from grpo.evaluation.intervals import maj_at_k, pass_at_k, wilson_interval
from grpo.generation.decoding import Decoder
from grpo.generation.greedy import ROWS_PER_PASS, greedy_across_ranks
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.runtime.checks import check_entries, is_count
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.scoring.tokens import left_pad
from tasks.base import Attempt, Problem, Task, prompt_of
from tasks.rewards.scoring import RewardFunction, score
from tasks.unrelated import QUESTIONS

TEST_PROBLEMS = 1000  # or all there are
SKILL_PROBLEMS = 100  # of each: losses of interest are of many points, and there are several skills
SAMPLES_PER_K = 2  # pass@k is estimated from this many times k samples
NOT_TRAINING = 10**6  # as `attempt` of `sampling_uniforms`: training never draws these


@dataclass(frozen=True)
class Evaluation:
    """The answers of a model to some problems."""

    problems: Sequence[Problem]
    attempts: Sequence[Attempt]  # one a problem
    completion_ids: Sequence[Sequence[int]] = ()

    @property
    def n(self) -> int:
        """Return the number of problems."""
        return len(self.problems)

    @cached_property
    def right(self) -> list[bool]:
        """Return which problems are answered right."""
        return [attempt.correct for attempt in self.attempts]

    @property
    def well_formed(self) -> float:
        """Return the share of answers in the form that the prompt asks for."""
        return sum(attempt.well_formed for attempt in self.attempts) / self.n

    @property
    def categories(self) -> dict[str, list[bool]]:
        """Return which problems are right in each category that the task names, in order."""
        found: dict[str, list[bool]] = {}
        for problem, right in zip(self.problems, self.right, strict=True):
            if problem.category:
                found.setdefault(problem.category, []).append(right)
        return dict(sorted(found.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the metrics file: accuracy, interval, well-formed share; accuracy by category."""
        categories = {name: proportion(right) for name, right in self.categories.items()}
        more = {"categories": categories} if categories else {}
        return {**proportion(self.right), "well_formed": self.well_formed, **more}


def proportion(right: Sequence[bool]) -> dict[str, float | int]:
    """Return the share that is right, of how many, with its Wilson 95% interval."""
    n, (low, high) = len(right), wilson_interval(sum(right), len(right))
    return {"accuracy": sum(right) / n, "n": n, "ci_low": low, "ci_high": high}


class Evaluator:
    """Measures policies on the same problems each time, all greedily except for pass@k and maj@k."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        skills: Mapping[str, Task],
        decoder: Decoder,
        rewards: Sequence[RewardFunction] = (),
        ranks: Ranks = ONE,
    ) -> None:
        """`skills` are the neighbouring skills of the starting model; `rewards`, if any, choose the best policy."""
        self.config, self.task, self.skills = config, task, skills
        self.decoder, self.rewards, self.ranks = decoder, rewards, ranks
        self.microbatch = AdaptiveMicrobatch("the evaluation", ROWS_PER_PASS, 1, config.shard)
        self.start: DriftBaseline | None = None  # what drift is measured from, if known
        self._held_out: dict[tuple[str, str, int], list[Problem]] = {}
        self._prompts: dict[tuple[str, str, str], list[int]] = {}  # by task, category and question

    def remember_start(self, lm: LanguageModel) -> None:
        """Record the starting model's answers to the unrelated questions, which drift is measured from."""
        decoder = Decoder(ranks=self.decoder.ranks)  # without shortcuts
        self.start = self.microbatch.run(lambda rows: DriftBaseline.record(lm, QUESTIONS, decoder, rows))

    def validate(self, lm: LanguageModel) -> dict[str, Any]:
        """Measure on the validation problems, which choose the policy that is kept; and the drift from the start."""
        found = self.evaluate(lm, self.task, self.problems("validation"))
        return {**found.to_dict(), **self._reward(found), "drift": self._drift(lm)}

    def test(self, lm: LanguageModel) -> dict[str, Any]:
        """Measure on the test problems, which are what is quoted, and on the neighbouring skills."""
        result = self.evaluate(lm, self.task, self.problems("test")).to_dict()
        skills = {name: self.evaluate(lm, skill, self._of(skill)).to_dict() for name, skill in self.skills.items()}
        return {**result, "drift": self._drift(lm), **self.sampled(lm, "test"), "skills": skills}

    def problems(self, split: str) -> list[Problem]:
        """Return the problems of the task that a split is measured on."""
        return self._held(self.task, split, TEST_PROBLEMS if split == "test" else self.config.eval_problems)

    def by_name(self, lm: LanguageModel, split: str) -> dict[str, Evaluation]:
        """Evaluate the task, under its name, on a split, and each skill as "skill: NAME"."""
        found = {self.task.name: self.evaluate(lm, self.task, self.problems(split))}
        return found | {
            f"skill: {name}": self.evaluate(lm, skill, self._of(skill)) for name, skill in self.skills.items()
        }

    def evaluate(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> Evaluation:
        """Answer each problem once, greedily, and grade it. The prompts of a problem are encoded once."""
        keys = [(task.name, p.category, p.question) for p in problems]
        new = {key: p for key, p in zip(keys, problems, strict=True) if key not in self._prompts}
        encoded = lm.prompts([prompt_of(task, problem) for problem in new.values()])
        self._prompts |= zip(new, encoded, strict=True)
        prompts = [self._prompts[key] for key in keys]
        limit = self.config.max_new_tokens
        completions = self.microbatch.run(
            lambda rows: greedy_across_ranks(lm, prompts, limit, rows, self.decoder, self.ranks)
        )
        found = graded(lm, task, problems, completions.rows(with_end=False))
        return replace(found, completion_ids=completions.rows())

    def sampled(self, lm: LanguageModel, split: str) -> dict[str, dict[str, float]]:
        """Estimate pass@k and maj@k on a split by sampling, if the settings ask for it."""
        if not self.config.pass_at_k:
            return {}
        return self.microbatch.run(lambda rows: self._sampled(lm, self.problems(split), rows))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        return {"evaluate_limit": self.microbatch.rows, "start": self.start and self.start.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if that cannot be its value."""
        start, limit = state.get("start"), state.get("evaluate_limit", ROWS_PER_PASS)
        check_entries({"evaluate_limit": is_count(limit), "start": start is None or DriftBaseline.is_state(start)})
        self.microbatch.rows = limit
        self.start = None if start is None else DriftBaseline(**start)

    def _sampled(
        self, lm: LanguageModel, problems: Sequence[Problem], rows_per_pass: int
    ) -> dict[str, dict[str, float]]:
        """Return pass@j and maj@j for j = 1, 2, 4, …, k, means over the problems, from 2k samples of each.

        The ranks share the problems out, and all get all samples.
        """
        k = self.config.pass_at_k
        n = SAMPLES_PER_K * k
        padded = self.ranks.padded(range(len(problems)))
        local = self._samples(lm, problems, padded[self.ranks.own_slice(len(padded))], n, rows_per_pass)
        samples = [texts for part in self.ranks.gather(local) for texts in part][: len(problems)]
        votes = []  # of each problem: the answers of its samples, and which of them are right
        for problem, texts in zip(problems, samples, strict=True):
            attempts = [self.task.grade(problem, text) for text in texts]
            votes.append(([attempt.answer for attempt in attempts], [attempt.correct for attempt in attempts]))
        ks = sorted({2**i for i in range(k.bit_length())} | {k})
        return {
            "pass_at_k": {str(j): fmean(pass_at_k(n, sum(right), j) for _, right in votes) for j in ks},
            "maj_at_k": {str(j): fmean(maj_at_k(*vote, j) for vote in votes) for j in ks},
        }

    def _samples(
        self, lm: LanguageModel, problems: Sequence[Problem], places: Sequence[int], n: int, rows_per_pass: int
    ) -> list[list[str]]:
        """Return the texts of `n` samples, at temperature 1, of the problem at each of some places in the list.

        They are a function of the seed and the place.
        """
        c = self.config
        params = SamplingParams(c.max_new_tokens, lm.end_ids, n)
        generator = Generator(lm.model, self.decoder)
        step = max(1, rows_per_pass // n)
        samples = []
        for first in range(0, len(places), step):
            some = places[first : first + step]
            uniforms = [sampling_uniforms(c.seed, place, n, c.max_new_tokens, NOT_TRAINING) for place in some]
            prompts = lm.prompts([prompt_of(self.task, problems[place]) for place in some])
            prefix = self.decoder.common_prefix(prompts)
            with in_precision(lm.model):
                padded = left_pad(prompts, lm.pad_id, lm.device)
                completions = generator(*padded, params, torch.cat(uniforms), rows_per_pass, prefix)
            texts = lm.decode(completions.rows(with_end=False))
            samples += [texts[i * n : (i + 1) * n] for i in range(len(some))]
        return samples

    def _reward(self, found: Evaluation) -> dict[str, float]:
        """Return the mean reward of the answers, if that chooses the best policy; 0 if no reward applies to any."""
        if not self.rewards:
            return {}
        ids = {"completion_ids": found.completion_ids}
        scored = self.ranks.on_main(lambda: score(self.rewards, found.attempts, ids))
        totals = [reward.total for reward in scored if reward.total is not None]
        return {"reward": fmean(totals) if totals else 0.0}

    def _drift(self, lm: LanguageModel) -> float | None:
        return None if self.start is None else self.microbatch.run(lambda rows: self.start.drift(lm, rows))

    def _of(self, skill: Task) -> list[Problem]:
        return self._held(skill, "test", SKILL_PROBLEMS)

    def _held(self, task: Task, split: str, limit: int) -> list[Problem]:
        key = (task.name, split, limit)
        if key not in self._held_out:
            self._held_out[key] = task.held_out(split, limit)
        return self._held_out[key]


def graded(
    lm: LanguageModel, task: Task, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
) -> Evaluation:
    """Grade the completions, as token ids, of some problems."""
    texts = lm.decode(completions)
    return Evaluation(problems, [task.grade(p, text) for p, text in zip(problems, texts, strict=True)])
