"""One step's data: sample completions, score them, keep everything that belongs together in one place."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from grpo.advantages import group_advantages
from grpo.config import TrainConfig
from grpo.logprobs import Tokens
from grpo.metrics import Stopwatch
from grpo.models import LanguageModel, precision
from grpo.sampling import generate, token_noise
from tasks.base import Problem, Reward, Task
from tasks.rewards import RewardFunction, score


@dataclass(frozen=True)
class RolloutBatch:
    """N problems with G completions each, group-major: row i belongs to problem i // G; B = N · G."""

    problems: Sequence[Problem]  # N
    tokens: Tokens  # ids and masks of prompts (N, P) and completions (B, C)
    completions: Sequence[str]  # B texts
    rewards: Sequence[Reward]  # B, by part
    advantages: Tensor  # (B,) float32
    truncated: Tensor  # (B,) bool: cut off by the token limit
    sample_logprobs: Tensor  # (B, C) float32, as the sampler had them

    def summary(self) -> dict[str, float | int | None]:
        """The rollout's part of a step's metrics; the README defines each name."""
        totals = torch.tensor([reward.total for reward in self.rewards]).view(len(self.problems), -1)  # (N, G)
        right = torch.tensor([reward.correct for reward in self.rewards]).view_as(totals)
        tied = totals.amax(1) == totals.amin(1)
        mask = self.tokens.completion_mask
        return {
            "reward_mean": float(totals.mean()),
            "reward_std": float(totals.std(1).mean()),
            **{f"reward/{name}": _mean([r.parts[name] for r in self.rewards]) for name in self.rewards[0].parts},
            "accuracy": float(right.float().mean()),
            "completion_length": float(mask.sum(-1).float().mean()),
            "truncated_fraction": float(self.truncated.float().mean()),
            "tied_groups_fraction": float(tied.float().mean()),
            "tied_all_right_fraction": float((tied & right.all(1)).float().mean()),
            "tied_all_wrong_fraction": float((tied & ~right.any(1)).float().mean()),
            "tokens": int(mask.sum()) + int(self.tokens.prompt_mask.sum()),
        }


def collect(
    lm: LanguageModel,
    task: Task,
    rewards: Sequence[RewardFunction],
    config: TrainConfig,
    step: int,
    clock: Stopwatch,
    *,
    shared: bool = True,
    limit: int | None = None,
) -> RolloutBatch:
    """The rollout of a step: a function of the policy, the seed and the step. At most `limit` rows at a time."""
    problems = [task.training_problem(config.seed, step, row) for row in range(config.batch_size)]
    with clock("sample"), precision(lm.device):
        prompt_ids, prompt_mask = lm.encode([task.messages(p.question) for p in problems])
        rows = config.batch_size * config.num_generations
        completions = generate(
            lm.model,
            prompt_ids,
            prompt_mask,
            num_generations=config.num_generations,
            max_new_tokens=config.max_new_tokens,
            end_ids=lm.end_ids,
            temperature=config.temperature,
            noise=token_noise(config.seed, step, rows, config.max_new_tokens),
            shared=shared,
            limit=limit,
        )
        texts = lm.decode(completions)
    with clock("reward"):
        of_row = [problem for problem in problems for _ in range(config.num_generations)]
        attempts = [task.judge(problem, text) for problem, text in zip(of_row, texts, strict=True)]
        lengths = completions.lengths.tolist()
        ids = [row[:n] for row, n in zip(completions.ids.tolist(), lengths, strict=True)]
        scored = score(rewards, attempts, {"completion_ids": ids}, clock)
    totals = torch.tensor([reward.total for reward in scored], device=lm.device)
    return RolloutBatch(
        problems=problems,
        tokens=Tokens(prompt_ids, prompt_mask, completions.ids, completions.mask),
        completions=texts,
        rewards=scored,
        advantages=group_advantages(totals, config.num_generations),
        truncated=~completions.ended,
        sample_logprobs=completions.logprobs,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over the completions that a reward function applied to; None where there are none."""
    applied = [value for value in values if value is not None]
    return fmean(applied) if applied else None
