"""A rollout without a model, with the fields that readers of completions use, and the batch of a whole step."""

import torch

from grpo.algorithm.loss import StepSizes
from grpo.algorithm.rollout import Rollout
from grpo.algorithm.update import Batch
from tasks.base import Problem, Reward

ODD = "a\ud800\x1b[2J</script>\u2028\n"


def a_rollout(groups=3, per_group=2, completion=ODD):
    """Return a rollout of equal, wrong completions without tokens."""
    rows = groups * per_group
    reward = Reward(0.4, {"format": 0.2, "close": 0.2, "mine": None}, correct=False, well_formed=True)
    problems = [Problem(f"What is {i}?", "1") for i in range(groups)]
    return Rollout(
        problems=problems,
        tokens=None,
        completion_texts=[completion] * rows,
        rewards=[reward] * rows,
        advantages=torch.arange(rows) / 2,
        truncated=torch.zeros(rows, dtype=torch.bool),
        sample_logprobs=torch.zeros(rows, 1),
    )


def a_batch(tokens, advantages, max_new_tokens):
    """Return a batch of all rows of a step, all of which count in the loss."""
    sizes = StepSizes(len(advantages), int(tokens.completion_mask.sum()), max_new_tokens)
    return Batch(tokens, advantages, sizes)
