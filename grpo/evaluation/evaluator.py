"""Measure accuracy, with its confidence interval, on problems that training never sees; also pass@k and maj@k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from grpo.config import TrainConfig
from grpo.evaluation.drift import DriftBaseline
from grpo.evaluation.intervals import maj_at_k, pass_at_k, wilson_interval
from grpo.generation.decoding import Decoder
from grpo.generation.greedy import ROWS_PER_PASS, greedy
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

TEST_PROBLEMS = 1000  # The test split has at most this many problems.
SKILL_PROBLEMS = 100  # A skill is measured on this many problems; few, because only a large loss matters.
SAMPLES_PER_K = 2  # pass@k is estimated from 2k samples of each problem.
MAX_FAILED_SHARE = 0.5  # A run ends if rewards fail on a larger share of the validation answers.
# The `attempt` of `sampling_uniforms` in evaluations. Training never redraws a group this often, so evaluations and
# training never share random numbers.
EVALUATION_ATTEMPT = 10**6


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to problems, with grades."""

    problems: Sequence[Problem]
    attempts: Sequence[Attempt]  # one for each problem
    completion_ids: Sequence[Sequence[int]] = ()  # including end tokens, unless the answer was cut off

    @cached_property
    def right(self) -> list[bool]:
        """Return, for each problem, whether its answer is right."""
        return [attempt.correct for attempt in self.attempts]

    @property
    def well_formed(self) -> float:
        """Return the share of answers in the form that the prompt asks for."""
        return fmean(attempt.well_formed for attempt in self.attempts)

    @property
    def categories(self) -> dict[str, list[bool]]:
        """Return for each category, sorted by name, whether each answer to its problems is right."""
        categories: dict[str, list[bool]] = {}
        for problem, right in zip(self.problems, self.right, strict=True):
            if problem.category:
                categories.setdefault(problem.category, []).append(right)
        return dict(sorted(categories.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the metrics file: accuracy, interval, well-formed share, accuracy by category."""
        figures = {**proportion(self.right), "well_formed": self.well_formed}
        categories = {name: proportion(right) for name, right in self.categories.items()}
        return figures | ({"categories": categories} if categories else {})


def proportion(right: Sequence[bool]) -> dict[str, float | int]:
    """Return the share of right answers, their number n, and the Wilson 95% interval of the share."""
    n = len(right)
    low, high = wilson_interval(sum(right), n)
    return {"accuracy": sum(right) / n, "n": n, "ci_low": low, "ci_high": high}


@dataclass
class Evaluator:
    """Measures policies on the same problems each time: greedily, except for pass@k and maj@k."""

    config: TrainConfig
    task: Task
    skills: Mapping[str, Task]  # neighbouring skills that the starting model has, by name
    decoder: Decoder
    rewards: Sequence[RewardFunction] = ()  # if there are any, their mean can choose the policy to save
    ranks: Ranks = ONE
    always_by_reward: bool = True  # False: the mean reward chooses only in evaluations without a right answer
    start: DriftBaseline | None = field(default=None, init=False)  # the starting model's answers, if known
    _problems: dict[tuple[str, str, int], list[Problem]] = field(default_factory=dict, init=False)
    _prompts: dict[tuple[str, str, str], list[int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Set the number of rows in a pass to its default."""
        self.microbatch = AdaptiveMicrobatch("the evaluation", ROWS_PER_PASS, 1, self.config.shard)

    def remember_start(self, lm: LanguageModel) -> None:
        """Record the starting model's answers to the unrelated questions, from which drift is measured."""
        decoder = Decoder(ranks=self.decoder.ranks)  # the plain decoder, without shortcuts
        self.start = self.microbatch.run(lambda rows: DriftBaseline.record(lm, QUESTIONS, decoder, rows))

    def validate(self, lm: LanguageModel) -> dict[str, Any]:
        """Return the drift and the figures on the validation problems. These figures choose the policy to save."""
        evaluation = self.evaluate(lm, self.task, self.problems("validation"))
        return {**evaluation.to_dict(), **self._reward(evaluation), "drift": self.drift(lm)}

    def test(self, lm: LanguageModel) -> dict[str, Any]:
        """Return what reports quote: the figures on test problems and skills, drift, pass@k and maj@k."""
        figures, *of_skills = (evaluation.to_dict() for evaluation in self.by_name(lm, "test").values())
        skills = dict(zip(self.skills, of_skills, strict=True))
        return {**figures, "drift": self.drift(lm), **self.sampled(lm, "test"), "skills": skills}

    def drift(self, lm: LanguageModel) -> float | None:
        """Return the drift of a policy, nats a token; None if the starting model's answers are not known."""
        return None if self.start is None else self.microbatch.run(lambda rows: self.start.drift(lm, rows))

    def problems(self, split: str) -> list[Problem]:
        """Return the task's problems in a split, at most as many as an evaluation measures."""
        return self._held_out(self.task, split, TEST_PROBLEMS if split == "test" else self.config.eval_problems)

    def by_name(self, lm: LanguageModel, split: str) -> dict[str, Evaluation]:
        """Return evaluations by name: first the task's on a split, then each skill's, named "skill: NAME"."""
        evaluations = {self.task.name: self.evaluate(lm, self.task, self.problems(split))}
        for name, skill in self.skills.items():
            problems = self._held_out(skill, "test", SKILL_PROBLEMS)
            evaluations[f"skill: {name}"] = self.evaluate(lm, skill, problems)
        return evaluations

    def evaluate(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> Evaluation:
        """Answer each problem once, greedily, and grade the answer. A problem's prompt is encoded only once."""
        keys = [(task.name, p.category, p.question) for p in problems]
        new = {key: p for key, p in zip(keys, problems, strict=True) if key not in self._prompts}
        encoded = lm.prompts([prompt_of(task, problem) for problem in new.values()])
        self._prompts |= zip(new, encoded, strict=True)
        prompts = [self._prompts[key] for key in keys]
        limit = self.config.max_new_tokens
        completions = self.microbatch.run(lambda rows: greedy(lm, prompts, limit, rows, self.decoder, self.ranks))
        evaluation = graded(lm, task, problems, completions.rows(with_end=False))
        return replace(evaluation, completion_ids=completions.rows())

    def sampled(self, lm: LanguageModel, split: str) -> dict[str, dict[str, float]]:
        """Return pass@j and maj@j on a split for j = 1, 2, 4, …, k, from 2k samples of each problem; {} if k is 0.

        Each rank samples answers to some of the problems; then every rank gets all samples.
        """
        k = self.config.pass_at_k
        if not k:
            return {}
        n = SAMPLES_PER_K * k
        problems = self.problems(split)
        padded = self.ranks.padded(range(len(problems)))
        places = padded[self.ranks.own_slice(len(padded))]
        local = self.microbatch.run(lambda rows: self._samples(lm, problems, places, n, rows))
        samples = [texts for part in self.ranks.gather(local) for texts in part][: len(problems)]
        votes = []  # for each problem: its samples' answers, and whether each answer is right
        for problem, texts in zip(problems, samples, strict=True):
            attempts = [self.task.grade(problem, text) for text in texts]
            votes.append(([attempt.answer for attempt in attempts], [attempt.correct for attempt in attempts]))
        ks = sorted({2**i for i in range(k.bit_length())} | {k})
        return {
            "pass_at_k": {str(j): fmean(pass_at_k(n, sum(right), j) for _, right in votes) for j in ks},
            "maj_at_k": {str(j): fmean(maj_at_k(*vote, j) for vote in votes) for j in ks},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, as JSON values."""
        return {"evaluate_limit": self.microbatch.rows, "start": self.start and self.start.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned. Raises a ValueError that names damaged entries, if any."""
        start = state.get("start")
        limit = state.get("evaluate_limit", ROWS_PER_PASS)
        check_entries({"evaluate_limit": is_count(limit), "start": start is None or DriftBaseline.is_state(start)})
        self.microbatch.rows = limit
        self.start = None if start is None else DriftBaseline(**start)

    def _samples(
        self, lm: LanguageModel, problems: Sequence[Problem], places: Sequence[int], n: int, rows_per_pass: int
    ) -> list[list[str]]:
        """Return the texts of `n` samples, at temperature 1, of each problem whose index is in `places`.

        The samples of a problem are a function of the seed and the problem's index.
        """
        c = self.config
        params = SamplingParams(c.max_new_tokens, lm.end_ids, n)
        generator = Generator(lm.model, self.decoder)
        step = max(1, rows_per_pass // n)
        samples = []
        for first in range(0, len(places), step):
            batch = places[first : first + step]
            uniforms = [sampling_uniforms(c.seed, place, n, c.max_new_tokens, EVALUATION_ATTEMPT) for place in batch]
            prompts = lm.prompts([prompt_of(self.task, problems[place]) for place in batch])
            prefix = self.decoder.common_prefix(prompts)
            with in_precision(lm.model):
                padded = left_pad(prompts, lm.pad_id, lm.model.device)
                completions = generator(*padded, params, torch.cat(uniforms), rows_per_pass, prefix)
            texts = lm.decode(completions.rows(with_end=False))
            samples += [texts[i * n : (i + 1) * n] for i in range(len(batch))]
        return samples

    def _reward(self, evaluation: Evaluation) -> dict[str, float]:
        """Return {"reward": mean reward}, with 0 if no reward applies; {} if accuracy chooses the policy."""
        if not self.rewards or (any(evaluation.right) and not self.always_by_reward):
            return {}
        ids = {"completion_ids": evaluation.completion_ids}
        scored = self.ranks.on_main(lambda: score(self.rewards, evaluation.attempts, ids, tolerant=True))
        failed = [reward.errors[0] for reward in scored if reward.errors]
        if len(failed) > MAX_FAILED_SHARE * len(scored):
            raise ValueError(f"{failed[0]}; rewards failed on {len(failed)} of {len(scored)} validation answers")
        totals = [reward.total for reward in scored if reward.total is not None]
        return {"reward": fmean(totals) if totals else 0.0}

    def _held_out(self, task: Task, split: str, limit: int) -> list[Problem]:
        key = (task.name, split, limit)
        if key not in self._problems:
            self._problems[key] = task.held_out(split, limit)
        return self._problems[key]


def graded(
    lm: LanguageModel, task: Task, problems: Sequence[Problem], completions: Sequence[Sequence[int]]
) -> Evaluation:
    """Return the evaluation of completions, given as token ids, one for each problem."""
    texts = lm.decode(completions)
    return Evaluation(problems, [task.grade(p, text) for p, text in zip(problems, texts, strict=True)])
