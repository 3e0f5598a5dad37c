"""One step's data: sample completions, score them, keep everything that belongs together in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo import ranks
from grpo.advantages import group_advantages
from grpo.config import TrainConfig
from grpo.logprobs import Tokens
from grpo.memory import PassLimit
from grpo.metrics import Stopwatch
from grpo.models import LanguageModel, precision
from grpo.sampling import Completions, concatenate, generate, token_noise
from tasks.base import Problem, Reward, Task
from tasks.rewards import RewardFunction, parse_rewards, repeats_an_ending, score


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
    resampled: int  # groups that were drawn again because they taught nothing

    def learned_tokens(self, config: TrainConfig) -> Tokens:
        """The tokens that the loss is taken over: all, or none of truncated completions (DAPO, section 3.4)."""
        if not config.mask_truncated:
            return self.tokens
        return replace(self.tokens, completion_mask=self.tokens.completion_mask & ~self.truncated.unsqueeze(-1))

    def summary(self) -> dict[str, float | int | None]:
        """The rollout's part of a step's metrics; the README defines each name."""
        totals = torch.tensor([reward.total for reward in self.rewards]).view(len(self.problems), -1)  # (N, G)
        right = torch.tensor([reward.correct for reward in self.rewards]).view_as(totals)
        tied = totals.amax(1) == totals.amin(1)
        parts = self.rewards[0].parts
        lengths, truncated = self.tokens.completion_mask.sum(-1).cpu(), self.truncated.cpu()
        return {
            "reward_mean": float(totals.mean()),
            "reward_std": float(totals.std(1).mean()),
            **{f"reward/{name}": _mean([r.parts[name] for r in self.rewards]) for name in parts},
            **{f"reward_std/{name}": self._spread([r.parts[name] for r in self.rewards]) for name in parts},
            "accuracy": float(right.float().mean()),
            "completion_length": float(lengths.float().mean()),
            "empty_fraction": float((lengths <= 1).float().mean()),
            "repeated_endings_fraction": fmean(map(repeats_an_ending, self.completions)),
            "truncated_fraction": float(truncated.float().mean()),
            "tied_groups_fraction": float(tied.float().mean()),
            "tied_all_right_fraction": float((tied & right.all(1)).float().mean()),
            "tied_all_wrong_fraction": float((tied & ~right.any(1)).float().mean()),
            "resampled_groups": self.resampled,
            "tokens": int(lengths.sum()) + int(self.tokens.prompt_mask.sum()),
        }

    def paid_and_wrong(self, count: int = 2) -> list[str]:
        """The wrong completions that are paid best, each once, with their questions and rewards."""
        g = len(self.rewards) // len(self.problems)
        rows = zip(range(len(self.rewards)), self.completions, self.rewards, strict=True)
        wrong = sorted((row for row in rows if not row[2].correct), key=lambda row: -row[2].total)
        lines = [f"{self.problems[i // g].question}  {text}  reward {r.total:.2f}, wrong" for i, text, r in wrong]
        return list(dict.fromkeys(lines))[:count]

    def _spread(self, part: Sequence[float | None]) -> float | None:
        """The standard deviation of a reward part in the group, mean over the groups where it is not 0; None if none.

        Groups that a part ties in say nothing of its scale.
        """
        g = len(part) // len(self.problems)
        groups = [[v for v in part[i : i + g] if v is not None] for i in range(0, len(part), g)]
        return _mean([stdev(group) for group in groups if len(group) > 1 and min(group) < max(group)])


@dataclass(frozen=True)
class Draw:
    """Some problems with a group of scored completions each: the rollout before it is put together."""

    problems: Sequence[Problem]
    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Completions
    texts: Sequence[str]
    rewards: Sequence[Reward]

    def tied(self) -> list[bool]:
        """Whether each group teaches nothing: its completions are all right or all wrong."""
        g = len(self.rewards) // len(self.problems)
        groups = [self.rewards[i : i + g] for i in range(0, len(self.rewards), g)]
        return [len({reward.correct for reward in group}) == 1 for group in groups]

    def to(self, device: torch.device | str) -> "Draw":
        """The same with its tensors there."""
        ids, mask = self.prompt_ids.to(device), self.prompt_mask.to(device)
        return replace(self, prompt_ids=ids, prompt_mask=mask, completions=self.completions.to(device))


def collect(
    lm: LanguageModel,
    task: Task,
    config: TrainConfig,
    step: int,
    clock: Stopwatch,
    *,
    rewards: Sequence[RewardFunction] = (),
    shared: bool = True,
    limit: PassLimit | None = None,
) -> RolloutBatch:
    """The rollout of a step: a function of the policy, the seed and the step. `limit` says how many rows at a time.

    Without `rewards`, those of the task are taken.
    """
    rewards = rewards or parse_rewards((), task.default_rewards)
    draw = partial(_draw, lm, task, rewards, config, step, clock=clock, shared=shared)
    if limit is not None:  # around what one process does alone: it may do that again with fewer rows
        draw = partial(limit.fit, draw)
    draws: list[Draw] = []
    chosen = [0] * config.batch_size  # the group of each place, counted through all draws
    places, resampled = list(range(config.batch_size)), 0
    for attempt in range(config.resample_tied + 1):
        known = sum(len(d.problems) for d in draws)
        new = _shared_out(draw, attempt, places)
        draws += new
        tied = [tie for d in new for tie in d.tied()]
        for number, place in enumerate(places):
            chosen[place] = known + number
        places = [place for number, place in enumerate(places) if tied[number]]
        if not places or attempt == config.resample_tied:
            break
        resampled += len(places)
    return _put_together(draws, chosen, resampled, config)


def _shared_out(
    draw: Callable[[int, Sequence[int], int], "Draw"], attempt: int, places: Sequence[int]
) -> list["Draw"]:
    """What all processes draw for their parts of the places, in order; there may be groups too many at the end."""
    padded = ranks.padded(places)
    own = ranks.own(len(padded))
    mine = draw(attempt, padded[own], own.start)
    device = mine.prompt_ids.device
    return [mine] if ranks.count() == 1 else [theirs.to(device) for theirs in ranks.gather(mine.to("cpu"))]


def _draw(
    lm: LanguageModel,
    task: Task,
    rewards: Sequence[RewardFunction],
    config: TrainConfig,
    step: int,
    attempt: int,
    places: Sequence[int],
    first: int,
    *,
    clock: Stopwatch,
    shared: bool,
    limit: int | None = None,
) -> Draw:
    """A problem with its group for each of some places of the batch; each attempt has others.

    `first` counts the places of the attempt that come before, whose noise is theirs.
    """
    numbers = [attempt * config.batch_size + place for place in places]
    problems = [task.training_problem(config.seed, step, number) for number in numbers]
    with clock("sample"), precision(lm.device):
        prompt_ids, prompt_mask = lm.encode([task.messages(p.question) for p in problems])
        before, rows = first * config.num_generations, len(problems) * config.num_generations
        noise = token_noise(config.seed, step, before + rows, config.max_new_tokens, attempt)[before:]
        completions = generate(
            lm.model,
            prompt_ids,
            prompt_mask,
            num_generations=config.num_generations,
            max_new_tokens=config.max_new_tokens,
            end_ids=lm.end_ids,
            temperature=config.temperature,
            noise=noise,
            shared=shared,
            limit=limit,
            graphs=config.cuda_graphs,
        )
        texts = lm.decode(completions)
    with clock("reward"):
        of_row = [problem for problem in problems for _ in range(config.num_generations)]
        attempts = [task.judge(problem, text) for problem, text in zip(of_row, texts, strict=True)]
        lengths = completions.lengths.tolist()
        ids = [row[:n] for row, n in zip(completions.ids.tolist(), lengths, strict=True)]
        scored = score(rewards, attempts, {"completion_ids": ids}, clock)
    return Draw(problems, prompt_ids, prompt_mask, completions, texts, scored)


def _put_together(draws: Sequence[Draw], chosen: Sequence[int], resampled: int, config: TrainConfig) -> RolloutBatch:
    """The rollout made of the chosen groups, which are counted through all draws."""
    g, width = config.num_generations, max(draw.prompt_ids.shape[1] for draw in draws)
    prompt_ids, prompt_mask = (
        torch.cat([pad(tensor, (width - tensor.shape[1], 0)) for tensor in tensors])[chosen]
        for tensors in ([draw.prompt_ids for draw in draws], [draw.prompt_mask for draw in draws])
    )
    rows = [group * g + i for group in chosen for i in range(g)]
    completions = concatenate([draw.completions for draw in draws]).pick(rows)
    problems, texts, rewards = (
        [item for items in of_draws for item in items]
        for of_draws in ([d.problems for d in draws], [d.texts for d in draws], [d.rewards for d in draws])
    )
    rewards = [rewards[row] for row in rows]
    totals = torch.tensor([reward.total for reward in rewards], device=prompt_ids.device)
    return RolloutBatch(
        problems=[problems[group] for group in chosen],
        tokens=Tokens(prompt_ids, prompt_mask, completions.ids, completions.mask),
        completions=[texts[row] for row in rows],
        rewards=rewards,
        advantages=group_advantages(totals, g, config.scale_rewards),
        truncated=~completions.ended,
        sample_logprobs=completions.logprobs,
        resampled=resampled,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over the completions that a reward function applied to; None where there are none."""
    applied = [value for value in values if value is not None]
    return fmean(applied) if applied else None
