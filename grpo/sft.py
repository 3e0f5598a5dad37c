"""Supervised fine-tuning (SFT) before GRPO: steps on ideal completions of training problems (`--sft-steps`).

SFT helps base models, and models that do not answer in the format of the task: if no completion gets a reward, GRPO
has nothing to compare.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.schedules import learning_rate_at
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.model.language_model import LanguageModel
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.runtime.precision import in_precision
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.scorer import Scorer
from grpo.scoring.tokens import Tokens, tokens_of
from tasks.base import Message, Task, prompt_of
from tasks.common.shots import solved_problem

WARM_UP_SHARE = 0.1  # The learning rate rises during this share of the steps.
SEARCHED_PROBLEMS = 64  # If none of this many training problems has worked steps, assume that no problem has.


@dataclass(frozen=True)
class SupervisedTrainer:
    """Takes the supervised steps before GRPO. A step's problems depend only on the seed and the step number."""

    config: TrainConfig
    lm: LanguageModel
    task: Task
    update: Updater  # GRPO's updater, whose optimizer the supervised steps use

    @property
    def teaches_working(self) -> bool:
        """Return whether ideal completions have worked steps besides the answer, judged by some training problems."""
        rows = range(SEARCHED_PROBLEMS)
        return any(self.task.training_problem(self.config.seed, -1, row).working for row in rows)

    @cached_property
    def microbatch(self) -> AdaptiveMicrobatch:
        """Return the object that holds the number of rows in a pass, and halves it when memory runs out."""
        return AdaptiveMicrobatch("fine-tuning", self.config.sft_batch_size, 1, self.config.shard)

    def step(self, step: int) -> dict[str, Any]:
        """Take supervised step number `step`, counted from 1; return its metrics."""
        c = self.config
        clock = Stopwatch(self.lm.model.device)
        update = self.update
        rate = learning_rate_at(step, c.sft_steps, c.sft_learning_rate, round(WARM_UP_SHARE * c.sft_steps), "linear")
        update.optimizer.param_groups[0]["lr"] = rate
        with clock("total"):
            tokens = supervised_tokens(self.lm, *self.batch(step))
            num_tokens = int(tokens.completion_mask.sum())
            own_tokens = tokens.slice_rows(update.ranks.own_slice(c.sft_batch_size))
            with update.recompute_activations() if c.gradient_checkpointing else nullcontext():
                loss, norm = self.microbatch.run(lambda rows: self.supervised_update(own_tokens, num_tokens, rows))
        entry = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": num_tokens}
        return {**entry, "time/total": clock.seconds["total"]}

    def supervised_update(self, tokens: Tokens, num_tokens: int, rows_per_pass: int) -> tuple[float, float]:
        """Accumulate the gradient of a step, and apply it; return the loss and the norm of the gradient."""
        update = self.update
        own_loss = supervised_gradient(self.lm.model, tokens, num_tokens, update.scorer, rows_per_pass)
        with update.ranks.end_if_out_of_memory("the optimizer's step"):
            loss, norm, _ = update.apply_gradient(update.ranks.all_reduce(own_loss))
        return loss, norm

    def batch(self, step: int) -> tuple[list[list[Message]], list[str]]:
        """Return the chats and ideal completions of a step, one chat and one completion per problem.

        The problems are drawn with the step number −1 − `step`, so that they differ from the problems of GRPO.
        """
        rows = range(self.config.sft_batch_size)
        solved = [solved_problem(self.task, self.config.seed, -1 - step, row) for row in rows]
        return [prompt_of(self.task, problem) for problem, _ in solved], [text for _, text in solved]


def supervised_tokens(lm: LanguageModel, chats: Sequence[Sequence[Message]], completions: Sequence[str]) -> Tokens:
    """Return the tokens of chats with one completion each, in the format of sampled completions.

    A completion is cut off where the model has no more positions.
    """
    prompts = lm.prompts(chats)
    ids = [lm.completion(text) for text in completions]
    if lm.positions is not None:
        ids = [row[: lm.positions - len(prompt)] for prompt, row in zip(prompts, ids, strict=True)]
    return tokens_of(prompts, ids, lm.pad_id, lm.model.device)


def supervised_gradient(
    model: PreTrainedModel, tokens: Tokens, num_tokens: int, scorer: Scorer, rows_per_pass: int
) -> Tensor:
    """Return −log p summed over the completion tokens, divided by `num_tokens`; leave its gradient in the model.

    `num_tokens` is the number of completion tokens of all ranks.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.completion_ids.device)
    for rows in split_microbatches(len(tokens.completion_ids), 1, rows_per_pass):
        with in_precision(model):
            logprobs = scorer.logprobs(model, tokens.slice_rows(rows), 1.0)  # 0 on padding
            loss = -logprobs.sum() / num_tokens
            loss.backward()
        total += loss.detach()
    return total
