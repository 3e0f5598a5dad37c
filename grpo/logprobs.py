"""Per-token log-probabilities of completions. The shift by one is here and nowhere else.

All G completions of a group share their prompt. `shared_logprobs` runs it through the model once, with
gradient, repeats its key/value cache G times and runs the completions on that: N · P + B · C tokens instead
of B · (P + C), exact in float32. `dense_logprobs` runs every row in full: the oracle of the tests, and the
way for models whose cache cannot be shared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from grpo.memory import is_refusal
from grpo.sampling import positions

SAME = 1e-3  # nats; shared and dense differ by 1e-6 in float32 where a model can share at all
CHUNK = 2**24  # logits in float32 at a time: 64 MiB


@dataclass(frozen=True)
class Tokens:
    """The tokens of N prompts and B = N · G completions, group-major."""

    prompt_ids: Tensor  # (N, P) int64, left-padded
    prompt_mask: Tensor  # (N, P) bool
    completion_ids: Tensor  # (B, C) int64, right-padded
    completion_mask: Tensor  # (B, C) bool, through the first end token, inclusive

    @property
    def num_generations(self) -> int:
        """G."""
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    def part(self, rows: slice) -> "Tokens":
        """Some rows, whole groups or a part of one, trimmed to their own longest prompt and completion."""
        groups = slice(rows.start // self.num_generations, -(-rows.stop // self.num_generations))
        left = int(self.prompt_mask[groups].any(0).long().argmax())
        width = max(1, int(self.completion_mask[rows].sum(-1).max()))
        return Tokens(
            self.prompt_ids[groups, left:],
            self.prompt_mask[groups, left:],
            self.completion_ids[rows, :width],
            self.completion_mask[rows, :width],
        )


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of `ids`, float32, in the shape of `ids`; logits are (…, V).

    In chunks of rows, so that no float32 copy of all logits stands in memory; each chunk is computed again
    in the backward pass.
    """
    rows = max(1, CHUNK // max(1, logits[0].numel()))
    if rows >= logits.shape[0]:
        return _token_logprobs(logits, ids, temperature)
    parts = [
        checkpoint(_token_logprobs, some, of, temperature, use_reentrant=False)
        for some, of in zip(logits.split(rows), ids.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """The entropy of softmax(logits / temperature), nats, without gradient; (…, V) to (…)."""
    rows = max(1, CHUNK // max(1, logits[0].numel()))
    parts = []
    for some in logits.split(rows):
        logp = (some.float() / temperature).log_softmax(-1)
        parts.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(parts)


def shared_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Logits of the first completion token (B, 1, V) and of the others (B, C − 1, V), by the shared prefix."""
    repeats = tokens.num_generations
    cache = DynamicCache()
    out = model(
        input_ids=tokens.prompt_ids,
        attention_mask=tokens.prompt_mask.long(),
        position_ids=positions(tokens.prompt_mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    first = out.logits.repeat_interleave(repeats, 0)  # (B, 1, V)
    inputs = tokens.completion_ids[:, :-1]
    if inputs.shape[1] == 0:
        return first, first[:, :0]
    cache.batch_repeat_interleave(repeats)
    # padding comes after the real tokens, where attention does not look: it needs no mask
    prompt_mask = tokens.prompt_mask.repeat_interleave(repeats, 0)
    mask = torch.cat([prompt_mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
    out = model(
        input_ids=inputs,
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, -inputs.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return first, out.logits


def dense_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The same logits, every row run in full."""
    inputs = tokens.completion_ids[:, :-1]
    prompt_ids = tokens.prompt_ids.repeat_interleave(tokens.num_generations, 0)
    prompt_mask = tokens.prompt_mask.repeat_interleave(tokens.num_generations, 0)
    mask = torch.cat([prompt_mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
    out = model(
        input_ids=torch.cat([prompt_ids, inputs], 1),
        attention_mask=mask.long(),
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=inputs.shape[1] + 1,
    )
    return out.logits[:, :1], out.logits[:, 1:]


def completion_logprobs(
    model: PreTrainedModel, tokens: Tokens, temperature: float, *, shared: bool = True, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the completions' tokens, (B, C) float32; column j scores completion token j.

    With `entropy`, also the entropy of each distribution that a token was drawn from, nats, (B, C), without
    gradient. Values on padding mean nothing: use the mask.
    """
    first, rest = (shared_logits if shared else dense_logits)(model, tokens)
    ids = tokens.completion_ids
    logprobs = [token_logprobs(first, ids[:, :1], temperature), token_logprobs(rest, ids[:, 1:], temperature)]
    if not entropy:
        return torch.cat(logprobs, 1), None
    entropies = [token_entropy(first, temperature), token_entropy(rest, temperature)]
    return torch.cat(logprobs, 1), torch.cat(entropies, 1)


@torch.no_grad()
def can_share(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> bool:
    """Whether the shared prefix gives this model's log-probabilities: tried on its prompts against the dense path.

    Models whose cache is not one of keys and values (state-space layers), or that refuse one, cannot.
    """
    completion_ids = prompt_ids[:, -8:].repeat_interleave(2, 0)  # any tokens do
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    dense, _ = completion_logprobs(model, tokens, 1.0, shared=False)
    try:
        shared, _ = completion_logprobs(model, tokens, 1.0, shared=True)
    except Exception as error:
        if not is_refusal(error):
            raise
        return False
    return bool((shared - dense).abs().max() < SAME)
