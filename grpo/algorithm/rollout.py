"""One step's data: sample completions, score them, keep everything that belongs together in one place."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo.algorithm.advantages import decoupled_advantages, group_advantages
from grpo.config import TrainConfig
from grpo.generation.sampling import Completions, Generator, SamplingParams, concatenate, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.runtime import distributed
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.precision import in_precision
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.tokens import Tokens, shared_beginning
from tasks.base import Problem, Reward, Task, prompt_of
from tasks.rewards.scoring import RewardFunction, score


@dataclass(frozen=True)
class Rollout:
    """N problems with G completions each, group-major: row i belongs to problem i // G; B = N · G."""

    problems: Sequence[Problem]  # N
    tokens: Tokens  # ids and masks of prompts (N, P) and completions (B, C)
    completion_texts: Sequence[str]  # B
    rewards: Sequence[Reward]  # B, by part
    advantages: Tensor  # (B,) float32
    truncated: Tensor  # (B,) bool: cut off by the token limit
    sample_logprobs: Tensor  # (B, C) float32, as the sampler computed them
    sampled: Sequence[tuple[Problem, int, int]]  # all that were drawn, with their right and wrong completions

    @property
    def resampled(self) -> int:
        """Return how many groups were drawn again because all completions were right or all wrong."""
        return len(self.sampled) - len(self.problems)

    @cached_property
    def totals(self) -> Tensor:
        """Return the rewards by group, (N, G) float64; NaN for a completion that no reward applies to."""
        return _totals(self.rewards).view(len(self.problems), -1)

    @cached_property
    def applies(self) -> Tensor:
        """Return which completions have a reward, (B,) bool, on the CPU."""
        return ~self.totals.isnan().view(-1)

    @cached_property
    def correct(self) -> Tensor:
        """Return which completions are right, by group, (N, G) bool."""
        return torch.tensor([reward.correct for reward in self.rewards]).view_as(self.totals)

    @cached_property
    def tied(self) -> Tensor:
        """Return which groups teach nothing, (N,) bool: those of equal rewards."""
        return (self.advantages.view(len(self.problems), -1) == 0).all(1).cpu()

    @cached_property
    def lengths(self) -> Tensor:
        """Return the tokens of each completion, (B,), on the CPU."""
        return self.tokens.completion_mask.sum(-1).cpu()

    def loss_tokens(self, config: TrainConfig) -> Tokens:
        """Return the tokens the loss is taken over.

        Left out are completions that no reward applies to and, if the settings say so, truncated ones (DAPO, section
        3.4).
        """
        counts = self.applies.to(self.truncated.device)
        if config.mask_truncated_completions:
            counts = counts & ~self.truncated
        if bool(counts.all()):
            return self.tokens
        return replace(self.tokens, completion_mask=self.tokens.completion_mask & counts.unsqueeze(-1))

    def samples(self, step: int, groups: int) -> list[dict[str, Any]]:
        """Return the completions of the first `groups` groups as JSON values, with question and rewards."""
        g = len(self.rewards) // len(self.problems)
        return [
            {
                "step": step,
                "prompt": self.problems[row // g].question,
                "completion": self.completion_texts[row],
                "rewards": dict(reward.parts),
                "reward": reward.total,
                "advantage": float(self.advantages[row]),
                "correct": reward.correct,
            }
            for row, reward in enumerate(self.rewards[: groups * g])
        ]

    def top_rewarded_wrong(self, count: int = 2) -> list[str]:
        """Return the wrong completions with the highest rewards, each once, with question and reward."""
        g = len(self.rewards) // len(self.problems)
        rows = zip(range(len(self.rewards)), self.completion_texts, self.rewards, strict=True)
        wrong = [row for row in rows if not row[2].correct and row[2].total is not None]
        wrong.sort(key=lambda row: -row[2].total)
        lines = [f"{self.problems[i // g].question}  {text}  reward {r.total:.2f}, wrong" for i, text, r in wrong]
        return list(dict.fromkeys(lines))[:count]


@dataclass(frozen=True)
class ScoredGroups:
    """Some problems with a group of scored completions each, of which a rollout is built."""

    problems: Sequence[Problem]
    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Completions
    texts: Sequence[str]
    rewards: Sequence[Reward]

    def all_alike(self) -> list[bool]:
        """Return whether the completions of each group are all right or all wrong."""
        g = len(self.rewards) // len(self.problems)
        groups = [self.rewards[i : i + g] for i in range(0, len(self.rewards), g)]
        return [len({reward.correct for reward in group}) == 1 for group in groups]

    def counts(self) -> list[tuple[Problem, int, int]]:
        """Return each problem with the number of its right and its wrong completions."""
        g = len(self.rewards) // len(self.problems)
        groups = (self.rewards[i : i + g] for i in range(0, len(self.rewards), g))
        right = (sum(reward.correct for reward in group) for group in groups)
        return [(problem, n, g - n) for problem, n in zip(self.problems, right, strict=True)]

    def to(self, device: torch.device | str) -> "ScoredGroups":
        """Return a copy with all tensors on `device`."""
        ids, mask = self.prompt_ids.to(device), self.prompt_mask.to(device)
        return replace(self, prompt_ids=ids, prompt_mask=mask, completions=self.completions.to(device))


@dataclass(frozen=True)
class RolloutSampler:
    """Samples a step: `sampler.rollout(step, config, clock)` is a function of the policy, the seed and the step."""

    lm: LanguageModel
    task: Task
    rewards: Sequence[RewardFunction]
    generator: Generator
    microbatch: AdaptiveMicrobatch
    training_problem: Callable[[int, int, int], Problem]  # of a seed, a step and a row

    def rollout(self, step: int, config: TrainConfig, clock: Stopwatch) -> Rollout:
        """Sample and score the groups of a step; draw tied ones again with other problems if the settings say so."""
        found: list[ScoredGroups] = []
        drawn: list[tuple[Problem, int, int]] = []
        chosen = [0] * config.batch_size  # the group of each place in the batch, counted through `found`
        places = list(range(config.batch_size))
        for attempt in range(config.resample_tied + 1):
            known = sum(len(groups.problems) for groups in found)
            new = self._sample_across_ranks(step, attempt, places, config, clock)
            found += new
            drawn += [counts for groups in new for counts in groups.counts()][: len(places)]  # without padding
            tied = [alike for groups in new for alike in groups.all_alike()]
            for number, place in enumerate(places):
                chosen[place] = known + number
            places = [place for number, place in enumerate(places) if tied[number]]
            if not places:
                break
        return build_rollout(found, chosen, drawn, config, self.rewards)

    def _sample_across_ranks(
        self, step: int, attempt: int, places: Sequence[int], config: TrainConfig, clock: Stopwatch
    ) -> list[ScoredGroups]:
        """Return the groups of all ranks for these places of the batch, in order; padding may follow at the end.

        Each attempt has other problems, and each place its own row of uniforms, whichever rank samples it.
        """
        padded = distributed.pad_to_world_size(places)
        own, g = distributed.local_slice(len(padded)), config.num_generations
        numbers = [attempt * config.batch_size + place for place in padded[own]]
        problems = [self.training_problem(config.seed, step, number) for number in numbers]
        uniforms = sampling_uniforms(config.seed, step, own.stop * g, config.max_new_tokens, attempt)[own.start * g :]
        # around what a rank does alone: it may repeat that with fewer rows
        local = self.microbatch.run(self._sample_groups, problems, uniforms, config, clock)
        if distributed.world_size() == 1:
            return [local]
        return [groups.to(local.prompt_ids.device) for groups in distributed.gather(local.to("cpu"))]

    def _sample_groups(
        self, problems: Sequence[Problem], uniforms: Tensor, config: TrainConfig, clock: Stopwatch, max_rows: int
    ) -> ScoredGroups:
        """Sample and score a group for each problem."""
        with clock("sample"), in_precision(self.lm.model):
            prompt_ids, prompt_mask = self.lm.encode([prompt_of(self.task, p) for p in problems])
            params = SamplingParams(
                config.max_new_tokens, self.lm.end_ids, config.num_generations, config.temperature
            )
            shares = self.generator.capabilities.supports_common_prefix
            common = shared_beginning(self.lm.model, prompt_ids, prompt_mask) if shares else 0
            completions = self.generator(prompt_ids, prompt_mask, params, uniforms, max_rows, common)
            texts = self.lm.decode(completions.rows(with_end=False))
        with clock("reward"):
            of_row = [problem for problem in problems for _ in range(config.num_generations)]
            attempts = [self.task.grade(problem, text) for problem, text in zip(of_row, texts, strict=True)]
            scored = score(self.rewards, attempts, {"completion_ids": completions.rows()}, clock)
        return ScoredGroups(problems, prompt_ids, prompt_mask, completions, texts, scored)


def build_rollout(
    found: Sequence[ScoredGroups],
    chosen: Sequence[int],
    drawn: Sequence[tuple[Problem, int, int]],
    config: TrainConfig,
    functions: Sequence[RewardFunction],
) -> Rollout:
    """Make a rollout of the chosen groups, counted through all of `found`.

    `drawn` are all problems, with their right and wrong completions; `functions` are those of the rewards.
    """
    g, width = config.num_generations, max(groups.prompt_ids.shape[1] for groups in found)
    prompt_ids, prompt_mask = (
        torch.cat([pad(tensor, (width - tensor.shape[1], 0)) for tensor in tensors])[chosen]
        for tensors in ([groups.prompt_ids for groups in found], [groups.prompt_mask for groups in found])
    )
    rows = [group * g + i for group in chosen for i in range(g)]
    completions = concatenate([groups.completions for groups in found]).pick(rows)
    problems = [problem for groups in found for problem in groups.problems]
    texts = [text for groups in found for text in groups.texts]
    all_rewards = [reward for groups in found for reward in groups.rewards]
    rewards = [all_rewards[row] for row in rows]
    if config.multi_objective_aggregation == "normalize_then_sum":
        values = [[_number(reward.parts[f.name]) for f in functions] for reward in rewards]
        parts = torch.tensor(values, dtype=torch.float64)
        weights = torch.tensor([f.weight for f in functions])
        advantages = decoupled_advantages(parts, weights, g, config.scale_rewards)
    else:
        advantages = group_advantages(_totals(rewards), g, config.scale_rewards)
    return Rollout(
        problems=[problems[group] for group in chosen],
        tokens=Tokens(prompt_ids, prompt_mask, completions.ids, completions.mask),
        completion_texts=[texts[row] for row in rows],
        rewards=rewards,
        advantages=advantages.to(prompt_ids.device),
        truncated=~completions.ended,
        sample_logprobs=completions.logprobs,
        sampled=drawn,
    )


def _totals(rewards: Sequence[Reward]) -> Tensor:
    """Return the total rewards, (B,) float64, on the CPU; NaN where none applies."""
    return torch.tensor([_number(reward.total) for reward in rewards], dtype=torch.float64)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
