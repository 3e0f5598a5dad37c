"""GRPO without a shortcut: one completion at a time, as in the algorithm box of the paper.

    python -m grpo.plain        trains the bundled starter model for three steps, and prints them

Source: DeepSeekMath, arXiv:2402.03300, algorithm 1, equations 3 and 4. Read this file first. It has no padding, no
attention masks, no caches, no micro-batches and no processes. `grpo/algorithm/grpo.py` computes the same, many times
faster: the random numbers that decide the tokens depend only on seed, step, row and column, so both draw the same
completions, and the tests compare their weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.algorithm.advantages import group_advantages
from grpo.algorithm.loss import clipped_surrogate, token_kl
from grpo.config import TrainConfig
from grpo.generation.sampling import sample_inverse_cdf, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.model.loading import load_policy
from grpo.model_card import resolve
from tasks.base import Reward, Task, prompt_of
from tasks.registry import make_task
from tasks.rewards.scoring import rewards_of, score


@dataclass(frozen=True)
class Completion:
    """One completion of a group, with all that its loss depends on."""

    prompt: Sequence[int]  # P token ids
    ids: Sequence[int]  # C token ids, through the first end token
    text: str
    reward: Reward
    advantage: Tensor  # scalar float32
    old_logprobs: Tensor  # (C,) of the policy that sampled
    ref_logprobs: Tensor  # (C,) of the reference


def sample(lm: LanguageModel, prompt: Sequence[int], uniforms: Tensor, temperature: float) -> list[int]:
    """Sample one completion, a token for each of the uniforms (C,), until a token that ends the turn."""
    ids: list[int] = []
    for uniform in uniforms:
        logits = lm.model(torch.tensor([[*prompt, *ids]])).logits[:, -1]  # (1, V)
        ids += sample_inverse_cdf((logits / temperature).softmax(-1), uniform[None]).tolist()
        if ids[-1] in lm.end_ids:
            break
    return ids


def token_logprobs(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Tensor:
    """Return the log-probability of each token of a completion, (C,) float32."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0]  # (P + C, V)
    predicting = logits[len(prompt) - 1 : -1]  # (C, V): each position predicts the token after it
    return (predicting / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


def objective(logprobs: Tensor, completion: Completion, c: TrainConfig) -> Tensor:
    """Return min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL of each token, (C,), to be maximised."""
    log_ratio = logprobs - completion.old_logprobs
    if c.ratio == "sequence":  # GSPO: one ratio for all tokens, the geometric mean of theirs
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    ratio = log_ratio.exp()
    surrogate = clipped_surrogate(ratio[None], completion.advantage[None], c.epsilon, c.epsilon_high or c.epsilon)[0]
    return surrogate - c.beta * token_kl(logprobs, completion.ref_logprobs)


def loss(logprobs: Sequence[Tensor], completions: Sequence[Completion], c: TrainConfig) -> Tensor:
    """Return the negated mean objective of a step; `logprobs` has the policy's of each completion, (C,)."""
    objectives = [objective(own, completion, c) for own, completion in zip(logprobs, completions, strict=True)]
    if c.loss_average == "completion":  # over the tokens of a completion, then over the completions: GRPO
        return -torch.stack([values.mean() for values in objectives]).mean()
    total = torch.stack([values.sum() for values in objectives]).sum()
    if c.loss_average == "token":  # over all tokens of the step: DAPO
        return -total / sum(len(values) for values in objectives)
    return -total / (len(objectives) * c.max_new_tokens)  # "constant": Dr. GRPO


@torch.no_grad()
def sample_group(
    lm: LanguageModel, reference: PreTrainedModel, task: Task, c: TrainConfig, step: int, place: int
) -> list[Completion]:
    """Sample the G completions of one problem of a step, score them, and compare each with its group."""
    problem = task.training_problem(c.seed, step, place)
    [prompt] = lm.prompts([prompt_of(task, problem)])
    first = place * c.num_generations  # row of the step's uniforms, (B, C)
    uniforms = sampling_uniforms(c.seed, step, first + c.num_generations, c.max_new_tokens)[first:]
    group = [sample(lm, prompt, row, c.temperature) for row in uniforms]
    texts = lm.decode([ids[:-1] if ids[-1] in lm.end_ids else ids for ids in group])
    rewards = score(rewards_of(c, task), [task.grade(problem, text) for text in texts], {"completion_ids": group})
    totals = torch.tensor([reward.total for reward in rewards], dtype=torch.float64)  # (G,)
    old_logprobs = [token_logprobs(lm.model, prompt, ids, c.temperature) for ids in group]
    ref_logprobs = [token_logprobs(reference, prompt, ids, c.temperature) for ids in group]
    advantages = group_advantages(totals, c.num_generations, c.scale_rewards)
    columns = zip(group, texts, rewards, advantages, old_logprobs, ref_logprobs, strict=True)
    return [Completion(prompt, *column) for column in columns]


def train(lm: LanguageModel, task: Task, c: TrainConfig, steps: int) -> list[list[Completion]]:
    """Take some steps of GRPO, print each, and return the completions of each."""
    reference = copy.deepcopy(lm.model)
    optimizer = torch.optim.AdamW(lm.model.parameters(), c.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    done = []
    for step in range(1, steps + 1):
        groups = [sample_group(lm, reference, task, c, step, n) for n in range(c.batch_size)]
        completions = [completion for group in groups for completion in group]
        for _ in range(c.num_inner_updates):  # μ
            logprobs = [token_logprobs(lm.model, each.prompt, each.ids, c.temperature) for each in completions]
            optimizer.zero_grad()
            loss(logprobs, completions, c).backward()
            nn.utils.clip_grad_norm_(lm.model.parameters(), c.clip_grad_norm)
            optimizer.step()
        done.append(completions)
        mean = sum(each.reward.total for each in completions) / len(completions)
        right = sum(each.reward.correct for each in completions)
        print(f"step {step}: mean reward {mean:.3f}, {right} of {len(completions)} completions are right")
    return done


if __name__ == "__main__":
    settings = resolve({"model": "starter", "device": "cpu"})
    train(load_policy(settings, torch.device("cpu")), make_task(settings), settings, steps=3)
