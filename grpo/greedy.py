"""Greedy decoding of many prompts: what an evaluation does.

The problems of a task share their system prompt, which is most of what there is to compute: it is run once for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.memory import gives
from grpo.sampling import Completions, concatenate, generate, left_pad, prefill


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    limit: int,
    together: bool,
) -> Completions:
    """The greedy completion of each prompt, at most `limit` at a time, those of like length together.

    With `together`, the tokens that all prompts of a pass begin with are run once; ask `can_begin_together` first.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = []
    for start in range(0, len(order), limit):
        some = [prompts[i] for i in order[start : start + limit]]
        parts.append(
            generate(
                model,
                *left_pad(some, pad_id, model.device),
                num_generations=1,
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
                beginning=common_beginning(some) if together and len(some) > 1 else 0,
            )
        )
    return concatenate(parts).pick(sorted(range(len(order)), key=order.__getitem__))


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, but not the last of any: its logits are wanted."""
    first, last = min(prompts), max(prompts)  # in the order of lists, so all others begin as these two do
    alike = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), len(first))
    return min(alike, min(map(len, prompts)) - 1)


@torch.no_grad()
def can_begin_together(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> bool:
    """Whether a common beginning, run once, gives this model's log-probabilities: tried on some prompts."""
    ids, mask = left_pad(prompts, pad_id, model.device)

    def logprobs(beginning: int) -> Tensor:
        _, logits = prefill(model, ids, mask, beginning)
        return logits.float().log_softmax(-1)

    return gives(lambda: logprobs(common_beginning(prompts)), logprobs(0))
