"""Supervised fine-tuning (SFT) before GRPO: steps on ideal completions of training problems (`--sft-steps`).

For base models, and for models that do not write the form that the task asks for: where no completion earns a reward,
GRPO has nothing to compare.
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
from grpo.runtime.microbatch import AdaptiveMicrobatch, oom_is_fatal, split_microbatches
from grpo.runtime.precision import in_precision
from grpo.runtime.stopwatch import Stopwatch
from grpo.scoring.scorer import Scorer
from grpo.scoring.tokens import Tokens, tokens_of
from tasks.base import Message, Task, prompt_of
from tasks.common.shots import solved_problem

WARM_UP = 0.1  # of the steps
LOOKED_AT = 64  # training problems


@dataclass(frozen=True)
class SupervisedTrainer:
    """The steps before GRPO: `trainer.step(step)` is a function of the policy, the seed and the step."""

    config: TrainConfig
    lm: LanguageModel
    task: Task
    update: Updater  # of GRPO; its optimizer is lent to these steps

    @property
    def teaches_working(self) -> bool:
        """Return whether a training problem, of some, has a working to teach besides its answer."""
        return any(self.task.training_problem(self.config.seed, -1, row).working for row in range(LOOKED_AT))

    @cached_property
    def microbatch(self) -> AdaptiveMicrobatch:
        """Return the limit of rows in a pass."""
        return AdaptiveMicrobatch("fine-tuning", self.config.sft_batch_size, 1, self.config.shard)

    def step(self, step: int) -> dict[str, Any]:
        """Take step number `step`, from 1; return its metrics."""
        c, clock, model, update = self.config, Stopwatch(), self.lm.model, self.update
        ranks = update.ranks
        rate = learning_rate_at(step, c.sft_steps, c.sft_learning_rate, round(WARM_UP * c.sft_steps), "linear")
        update.set_learning_rate(rate)
        with clock("total"):
            tokens = supervised_tokens(self.lm, *self.batch(step))
            counted = int(tokens.completion_mask.sum())
            own = tokens.slice_rows(ranks.own_slice(c.sft_batch_size))
            recomputing = update.recompute_activations() if c.gradient_checkpointing else nullcontext()
            with recomputing:
                own_loss = self.microbatch.run(
                    lambda rows: supervised_gradient(model, own, counted, update.scorer, rows)
                )
            with oom_is_fatal("the optimizer's step", ranks):
                (loss, norm), _ = update.apply_gradient((ranks.sum(own_loss),))
        figures = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": counted}
        return {"step": step, **figures, "time/total": clock.seconds["total"]}

    def batch(self, step: int) -> tuple[list[list[Message]], list[str]]:
        """Return chats and ideal completions of a step; GRPO draws by step numbers from 1, these by negative ones."""
        rows = range(self.config.sft_batch_size)
        solved = [solved_problem(self.task, self.config.seed, -1 - step, row) for row in rows]
        return [prompt_of(self.task, problem) for problem, _ in solved], [text for _, text in solved]


def supervised_tokens(lm: LanguageModel, chats: Sequence[Sequence[Message]], completions: Sequence[str]) -> Tokens:
    """Return the tokens of chats with one completion each, in the form of those that GRPO samples."""
    return tokens_of(lm.prompts(chats), [lm.completion(text) for text in completions], lm.pad_id, lm.device)


def supervised_gradient(
    model: PreTrainedModel, tokens: Tokens, counted: int, scorer: Scorer, rows_per_pass: int
) -> Tensor:
    """Leave the gradient of the mean of -log p, nats, in the model; return that mean.

    `counted` is the number of completion tokens of all ranks, which the mean is over.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.completion_ids.device)
    for rows in split_microbatches(len(tokens.completion_ids), 1, rows_per_pass):
        with in_precision(model):
            logprobs = scorer.logprobs(model, tokens.slice_rows(rows), 1.0)  # 0 on padding
            loss = -logprobs.sum() / counted
            loss.backward()
        total += loss.detach()
    return total
