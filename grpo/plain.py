"""GRPO without shortcuts: one completion at a time, as in the algorithm box of the paper.

    python -m grpo.plain        trains the bundled starter model for three steps

Source: DeepSeekMath, arXiv:2402.03300, algorithm 1, equations 3 and 4. There is no padding, no attention mask, no
cache, no micro-batch and no second process. `grpo/algorithm/grpo.py` takes the same steps many times faster. The
random numbers that decide the tokens depend only on seed, step, row and column, so both programs draw the same
completions. The tests compare the weights after training with each of the two. Shapes: B completions in a step, G in
a group, P tokens in a prompt, C in a completion, V in the vocabulary.
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
    """One completion of a group, with everything that its loss depends on."""

    prompt: Sequence[int]  # P token ids
    ids: Sequence[int]  # C token ids, through the first end token
    reward: Reward
    advantage: Tensor  # scalar float32
    old_logprobs: Tensor  # (C,), under the policy that sampled
    ref_logprobs: Tensor  # (C,), under the reference


def sample(lm: LanguageModel, prompt: Sequence[int], uniforms: Tensor, temperature: float) -> list[int]:
    """Sample token ids until one ends the turn or `uniforms` runs out. Each uniform, in [0, 1), decides one token."""
    ids: list[int] = []
    for uniform in uniforms:
        logits = lm.model(torch.tensor([[*prompt, *ids]])).logits[:, -1]  # (1, V)
        token = int(sample_inverse_cdf((logits / temperature).softmax(-1), uniform.view(1)))
        ids.append(token)
        if token in lm.end_ids:
            break
    return ids


def token_logprobs(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Tensor:
    """Return the log-probability of each token of a completion, (C,) float32."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0]  # (P + C, V)
    predicting = logits[len(prompt) - 1 : -1]  # (C, V): each position predicts the token after it
    return (predicting / temperature).log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def objective(logprobs: Tensor, completion: Completion, c: TrainConfig) -> Tensor:
    """Return min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL of each token, (C,), to be maximised."""
    log_ratio = logprobs - completion.old_logprobs
    if c.ratio == "sequence":  # GSPO: every token gets the geometric mean of the completion's ratios
        log_ratio = log_ratio.mean().expand_as(log_ratio)
    ratio = log_ratio.exp()[None]  # (1, C), a batch of one completion
    surrogate = clipped_surrogate(ratio, completion.advantage[None], c.epsilon, c.epsilon_high or c.epsilon)[0]
    return surrogate - c.beta * token_kl(logprobs, completion.ref_logprobs)


def loss(logprobs: Sequence[Tensor], completions: Sequence[Completion], c: TrainConfig) -> Tensor:
    """Return the negated mean objective of a step; `logprobs` are the current policy's, (C,) for each completion."""
    objectives = [objective(now, completion, c) for now, completion in zip(logprobs, completions, strict=True)]
    if c.loss_average == "completion":  # GRPO: mean over the tokens of each completion, then over completions
        return -torch.stack([values.mean() for values in objectives]).mean()
    tokens = torch.cat(objectives)
    if c.loss_average == "token":  # DAPO: mean over all tokens of the step
        return -tokens.mean()
    return -tokens.sum() / (len(objectives) * c.max_new_tokens)  # Dr. GRPO: sum / (completions · limit)


@torch.no_grad()
def sample_group(
    lm: LanguageModel, reference: PreTrainedModel, task: Task, c: TrainConfig, step: int, group: int
) -> list[Completion]:
    """Return the G completions of group number `group`, sampled, scored, and each compared with the others."""
    problem = task.training_problem(c.seed, step, group)
    [prompt] = lm.prompts([prompt_of(task, problem)])
    rows = slice(group * c.num_generations, (group + 1) * c.num_generations)  # this group's rows among all B
    uniforms = sampling_uniforms(c.seed, step, rows.stop, c.max_new_tokens)[rows]  # (G, C)
    sampled = [sample(lm, prompt, row, c.temperature) for row in uniforms]
    texts = lm.decode([[token for token in ids if token not in lm.end_ids] for ids in sampled])
    attempts = [task.grade(problem, text) for text in texts]  # an attempt says whether its answer is right
    rewards = score(rewards_of(c, task), attempts, {"completion_ids": sampled})
    totals = torch.tensor([reward.total for reward in rewards], dtype=torch.float64)  # (G,)
    advantages = group_advantages(totals, c.num_generations, c.scale_rewards)  # (G,)
    completions = []
    for ids, reward, advantage in zip(sampled, rewards, advantages, strict=True):
        old_logprobs = token_logprobs(lm.model, prompt, ids, c.temperature)
        ref_logprobs = token_logprobs(reference, prompt, ids, c.temperature)
        completions.append(Completion(prompt, ids, reward, advantage, old_logprobs, ref_logprobs))
    return completions


def train(lm: LanguageModel, task: Task, c: TrainConfig, steps: int) -> list[list[Completion]]:
    """Take `steps` steps of GRPO and print a line for each; return the completions of each step."""
    reference = copy.deepcopy(lm.model)
    optimizer = torch.optim.AdamW(lm.model.parameters(), c.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    all_completions = []
    for step in range(1, steps + 1):
        groups = [sample_group(lm, reference, task, c, step, group) for group in range(c.batch_size)]
        completions = [completion for group in groups for completion in group]  # B
        for _ in range(c.num_inner_updates):
            logprobs = [token_logprobs(lm.model, each.prompt, each.ids, c.temperature) for each in completions]
            optimizer.zero_grad()
            loss(logprobs, completions, c).backward()
            nn.utils.clip_grad_norm_(lm.model.parameters(), c.clip_grad_norm)
            optimizer.step()
        all_completions.append(completions)
        mean = sum(each.reward.total for each in completions) / len(completions)
        right = sum(each.reward.correct for each in completions)
        print(f"step {step}: mean reward {mean:.3f}, {right} of {len(completions)} completions are right")
    return all_completions


if __name__ == "__main__":
    settings = resolve({"model": "starter", "device": "cpu"})
    train(load_policy(settings, torch.device("cpu")), make_task(settings), settings, steps=3)
