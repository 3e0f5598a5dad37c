"""One step's data: sample completions, score them, keep everything that belongs together in one place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from grpo.advantages import group_advantages
from grpo.config import TrainConfig
from grpo.console import printable
from grpo.logprobs import Tokens
from grpo.metrics import Stopwatch
from grpo.models import LanguageModel, precision
from grpo.sampling import generate, token_noise
from tasks.base import Problem, Reward, Task


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

    def summary(self, reward_parts: Sequence[str]) -> dict[str, float | int]:
        """The rollout's part of a step's metrics; the README defines each name."""
        totals = torch.tensor([reward.total for reward in self.rewards]).view(len(self.problems), -1)  # (N, G)
        right = torch.tensor([reward.correct for reward in self.rewards]).view_as(totals)
        tied = totals.amax(1) == totals.amin(1)
        mask = self.tokens.completion_mask
        return {
            "reward_mean": float(totals.mean()),
            "reward_std": float(totals.std(1).mean()),
            **{f"reward/{name}": fmean(reward.parts[name] for reward in self.rewards) for name in reward_parts},
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
        rewards = [_scored(task, problem, text) for problem, text in zip(of_row, texts, strict=True)]
    totals = torch.tensor([reward.total for reward in rewards], device=lm.device)
    return RolloutBatch(
        problems=problems,
        tokens=Tokens(prompt_ids, prompt_mask, completions.ids, completions.mask),
        completions=texts,
        rewards=rewards,
        advantages=group_advantages(totals, config.num_generations),
        truncated=~completions.ended,
        sample_logprobs=completions.logprobs,
    )


def _scored(task: Task, problem: Problem, completion: str) -> Reward:
    """The reward of a completion; raises ValueError, naming the reward function, where it is not a finite number."""
    reward = task.score(problem, completion)
    for name, value in reward.parts.items():
        if not math.isfinite(value):
            raise ValueError(
                f"reward function {name!r} gave {value} for the completion {printable(completion[:80])!r} of "
                f"{printable(problem.question[:80])!r}; it must return a finite number"
            )
    return reward
