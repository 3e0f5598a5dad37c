"""Sample and score the groups of one step; a `Rollout` holds problems, completions, rewards and advantages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo.algorithm.advantages import decoupled_advantages, group_advantages, tied_groups
from grpo.config import TrainConfig
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.precision import in_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.tokens import Tokens, left_pad, shared_from
from tasks.base import Problem, Reward, Task, prompt_of
from tasks.rewards.scoring import RewardFunction, score


@dataclass(frozen=True)
class Rollout:
    """N problems with G completions each, on the CPU, group-major: row i belongs to problem i // G; B = N · G."""

    # Set by sampling:
    problems: Sequence[Problem]  # length N
    tokens: Tokens  # ids and masks of prompts (N, P) and completions (B, C)
    sample_logprobs: Tensor  # (B, C) float32, as the sampler computed them
    truncated: Tensor  # (B,) bool: cut off by the token limit
    completion_texts: Sequence[str]  # length B
    # Set by scoring:
    rewards: Sequence[Reward] = ()  # length B
    # (B, K) float64, compared within groups: total rewards (K = 1), or each of K rewards with normalize_then_sum
    compared: Tensor = field(default_factory=lambda: torch.zeros(0))
    # Set for the groups that are trained on:
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (B,) float32

    @property
    def num_generations(self) -> int:
        """Return G."""
        return len(self.completion_texts) // len(self.problems)

    @cached_property
    def totals(self) -> Tensor:
        """Return the rewards by group, (N, G) float64; NaN for a completion that no reward applies to."""
        totals = [_number(reward.total) for reward in self.rewards]
        return torch.tensor(totals, dtype=torch.float64).view(len(self.problems), -1)

    @cached_property
    def applies(self) -> Tensor:
        """Return which completions have a reward, (B,) bool."""
        return ~self.totals.isnan().view(-1)

    @cached_property
    def correct(self) -> Tensor:
        """Return which completions are correct, by group, (N, G) bool."""
        return torch.tensor([reward.correct for reward in self.rewards]).view_as(self.totals)

    @cached_property
    def tied(self) -> Tensor:
        """Return which groups have equal rewards, (N,) bool. Nothing is learned from them: their advantages are 0."""
        by_group = self.compared.view(len(self.problems), -1, self.compared.shape[1])  # (N, G, K)
        return torch.stack([tied_groups(column) for column in by_group.unbind(-1)]).all(0)

    @cached_property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each completion, (B,)."""
        return self.tokens.completion_mask.sum(-1)

    def loss_tokens(self, config: TrainConfig) -> Tokens:
        """Return the tokens; their completion mask is True only for tokens that count in the loss.

        Completions without a reward do not count, nor do truncated ones with `mask_truncated_completions` (DAPO).
        """
        counts = self.applies
        if config.mask_truncated_completions:
            counts = counts & ~self.truncated
        return replace(self.tokens, completion_mask=self.tokens.completion_mask & counts.unsqueeze(-1))

    def pick(self, groups: Sequence[int]) -> "Rollout":
        """Return these groups, in this order, cut to the length of their longest completion, without advantages."""
        g = self.num_generations
        rows = [group * g + i for group in groups for i in range(g)]
        width = int(self.tokens.completion_mask[rows].sum(-1).max())
        tokens = Tokens(
            self.tokens.prompt_ids[groups],
            self.tokens.prompt_mask[groups],
            self.tokens.completion_ids[rows, :width],
            self.tokens.completion_mask[rows, :width],
        )
        return Rollout(
            problems=[self.problems[group] for group in groups],
            tokens=tokens,
            sample_logprobs=self.sample_logprobs[rows, :width],
            truncated=self.truncated[rows],
            completion_texts=[self.completion_texts[row] for row in rows],
            rewards=[self.rewards[row] for row in rows] if self.rewards else (),
            compared=self.compared[rows] if self.rewards else self.compared,
        )

    def samples(self, step: int, groups: int) -> list[dict[str, Any]]:
        """Return the completions of the first `groups` groups as JSON values, with question and rewards."""
        g = self.num_generations
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
        """Return up to `count` lines, one for each of the wrong completions with the highest rewards."""
        g = self.num_generations
        wrong = [i for i, reward in enumerate(self.rewards) if not reward.correct and reward.total is not None]
        wrong.sort(key=lambda i: -self.rewards[i].total)
        lines = [
            f"{self.problems[i // g].question}  {self.completion_texts[i]}  reward {self.rewards[i].total:.2f}, wrong"
            for i in wrong
        ]
        return list(dict.fromkeys(lines))[:count]  # without duplicates


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Join the groups of rollouts that have the same G. Prompts are padded on the left, completions on the right."""
    if len(parts) == 1:
        return parts[0]
    prompt_width = max(part.tokens.prompt_ids.shape[1] for part in parts)
    width = max(part.tokens.completion_ids.shape[1] for part in parts)

    def left(x: Tensor) -> Tensor:
        return pad(x, (prompt_width - x.shape[1], 0))

    def right(x: Tensor) -> Tensor:
        return pad(x, (0, width - x.shape[1]))

    return Rollout(
        problems=[problem for part in parts for problem in part.problems],
        tokens=Tokens(
            torch.cat([left(part.tokens.prompt_ids) for part in parts]),
            torch.cat([left(part.tokens.prompt_mask) for part in parts]),
            torch.cat([right(part.tokens.completion_ids) for part in parts]),
            torch.cat([right(part.tokens.completion_mask) for part in parts]),
        ),
        sample_logprobs=torch.cat([right(part.sample_logprobs) for part in parts]),
        truncated=torch.cat([part.truncated for part in parts]),
        completion_texts=[text for part in parts for text in part.completion_texts],
        rewards=[reward for part in parts for reward in part.rewards],
        compared=torch.cat([part.compared for part in parts]),
    )


def redraw_tied(
    drawn: Rollout, draw: Callable[[int, Sequence[int]], Rollout], attempts: int
) -> tuple[Rollout, list[int]]:
    """Draw tied groups again, with other problems, at most `attempts` times.

    `drawn` has a scored group for each place of a batch, and `draw(attempt, places)` draws a new group for each of
    the given places. Returns all groups that were drawn, and for each place the index of the group to train on.
    """
    kept = list(range(len(drawn.problems)))
    for attempt in range(1, attempts + 1):
        tied = [place for place, group in enumerate(kept) if drawn.tied[group]]
        if not tied:
            break
        for number, place in enumerate(tied):
            kept[place] = len(drawn.problems) + number
        drawn = concatenate([drawn, draw(attempt, tied)])
    return drawn, kept


@dataclass(frozen=True)
class RolloutSampler:
    """Samples and scores the groups of a step. The random numbers depend on seed and step, not on the process."""

    config: TrainConfig
    lm: LanguageModel
    task: Task
    rewards: Sequence[RewardFunction]
    generator: Generator
    microbatch: AdaptiveMicrobatch
    clock: Stopwatch
    ranks: Ranks = ONE

    def sample(self, step: int, num_generations: int) -> tuple[Rollout, Rollout]:
        """Sample and score a step's groups. Return all groups, and the groups to train on with their advantages."""
        c = self.config

        def draw(attempt: int, places: Sequence[int]) -> Rollout:
            return self._score(self._sample_across_ranks(step, attempt, places, num_generations))

        drawn = draw(0, range(c.batch_size))
        rollout = drawn
        if c.resample_tied:
            drawn, kept = redraw_tied(drawn, draw, c.resample_tied)
            rollout = drawn.pick(kept)
        return drawn, replace(rollout, advantages=self._advantages(rollout))

    def _sample_across_ranks(self, step: int, attempt: int, places: Sequence[int], num_generations: int) -> Rollout:
        """Sample a group, not yet scored, for each of these places of the batch. Each rank samples some of them.

        Problems and random numbers depend on attempt and place, not on the rank that samples a group.
        """
        c, g = self.config, num_generations
        padded = self.ranks.padded(places)
        own_groups = self.ranks.own_slice(len(padded))
        numbers = [attempt * c.batch_size + place for place in padded[own_groups]]
        problems = [self.task.training_problem(c.seed, step, number) for number in numbers]
        own_rows = slice(own_groups.start * g, own_groups.stop * g)
        uniforms = sampling_uniforms(c.seed, step, own_rows.stop, c.max_new_tokens, attempt)[own_rows]
        # If memory runs out on a rank, only this rank samples its part again, with fewer rows in a pass.
        local = self.microbatch.run(lambda rows_per_pass: self._sample(problems, uniforms, g, rows_per_pass))
        if self.ranks.size == 1:
            return local
        return concatenate(self.ranks.gather(local)).pick(range(len(places)))

    def _sample(
        self, problems: Sequence[Problem], uniforms: Tensor, num_generations: int, rows_per_pass: int
    ) -> Rollout:
        """Sample a group, not yet scored, for each problem."""
        c, lm, decoder = self.config, self.lm, self.generator.decoder
        with self.clock("sample"), in_precision(lm.model):
            prompts = lm.prompts([prompt_of(self.task, problem) for problem in problems])
            prompt_ids, prompt_mask = left_pad(prompts, lm.pad_id, torch.device("cpu"))
            params = SamplingParams(c.max_new_tokens, lm.end_ids, num_generations, c.temperature)
            common = decoder.common_prefix(prompts, least=shared_from(lm.model))
            completions = self.generator(prompt_ids, prompt_mask, params, uniforms, rows_per_pass, common)
            return Rollout(
                problems=problems,
                tokens=Tokens(prompt_ids, prompt_mask, completions.ids, completions.mask),
                sample_logprobs=completions.logprobs,
                truncated=~completions.ended,
                completion_texts=lm.decode(completions.rows(with_end=False)),
            )

    def _score(self, rollout: Rollout) -> Rollout:
        """Return the rollout with its rewards. Rank 0 scores all completions of a draw in one call."""
        with self.clock("reward"):
            rewards = self.ranks.on_main(lambda: self._rewards(rollout))
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            values = [[_number(reward.parts[f.name]) for f in self.rewards] for reward in rewards]
        else:
            values = [[_number(reward.total)] for reward in rewards]
        return replace(rollout, rewards=rewards, compared=torch.tensor(values, dtype=torch.float64))

    def _rewards(self, rollout: Rollout) -> list[Reward]:
        problems = [problem for problem in rollout.problems for _ in range(rollout.num_generations)]  # B
        attempts = [self.task.grade(*each) for each in zip(problems, rollout.completion_texts, strict=True)]
        ids = {"completion_ids": rollout.tokens.completion_rows()}
        return score(self.rewards, attempts, ids, self.clock, tolerant=True)

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantages of the completions, (B,) float32."""
        g, scale = rollout.num_generations, self.config.scale_rewards
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            weights = torch.tensor([f.weight for f in self.rewards])
            return decoupled_advantages(rollout.compared, weights, g, scale)
        return group_advantages(rollout.compared[:, 0], g, scale)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
