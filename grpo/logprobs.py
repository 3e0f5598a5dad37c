"""Per-token log-probabilities of completions. The shift by one is here and nowhere else.

All G completions of a group share their prompt. `packed_logits` runs all prompts and all completions through the
model as one row of their real tokens, each prompt once, with gradient: at most N · P + B · C tokens instead of
B · (P + C), exact in float32; who attends to whom is `grpo.packing`'s concern. `dense_logits` runs every row in full:
the oracle of the tests, and the way for models that cannot take such a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.memory import gives
from grpo.packing import Layout, disengage, engage
from grpo.sampling import positions

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
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
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
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
    parts = []
    for some in logits.split(rows):
        logp = (some.float() / temperature).log_softmax(-1)
        parts.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(parts)


def packed_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Logits of the first completion tokens, by prompt (N, V), and of the others, real ones only (M, V)."""
    engage(model)
    ids, prompts, inputs = tokens.completion_ids[:, :-1], tokens.prompt_mask, tokens.completion_mask[:, 1:]
    layout = Layout.of(prompts.sum(-1), inputs.sum(-1))
    n, places = len(prompts), positions(prompts)  # (N, P)
    starts = layout.prompt_lengths.repeat_interleave(tokens.num_generations)[:, None]
    own_places = starts + torch.arange(ids.shape[1], device=ids.device)  # (B, C - 1)
    # the layout's order; with the padding on the left, a prompt's last token is in the last column
    input_ids = [tokens.prompt_ids[:, :-1][prompts[:, :-1]], tokens.prompt_ids[:, -1], ids[inputs]]
    position_ids = [places[:, :-1][prompts[:, :-1]], places[:, -1], own_places[inputs]]
    out = model(
        input_ids=torch.cat(input_ids)[None],
        position_ids=torch.cat(position_ids)[None],
        attention_mask=ids.new_zeros(1, 1, 1, 1),  # so that the model makes none; the attention does not look at it
        use_cache=False,
        logits_to_keep=n + len(input_ids[-1]),
        layout=layout,
    )
    first, rest = out.logits[0].split([n, len(input_ids[-1])])
    return first, rest


def dense_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Logits of the first completion tokens (B, V) and of the others (B, C − 1, V), every row run in full."""
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
    return out.logits[:, 0], out.logits[:, 1:]


def completion_logprobs(
    model: PreTrainedModel, tokens: Tokens, temperature: float, *, shared: bool = True, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the completions' tokens, (B, C) float32; column j scores completion token j.

    With `entropy`, also the entropy of each distribution that a token was drawn from, nats, (B, C), without
    gradient. Both are 0 on padding.
    """
    ids, mask = tokens.completion_ids, tokens.completion_mask
    if shared:
        first, rest = packed_logits(model, tokens)
        first, rest_ids = first.repeat_interleave(tokens.num_generations, 0), ids[:, 1:][mask[:, 1:]]
    else:
        first, rest = dense_logits(model, tokens)
        rest_ids = ids[:, 1:]
    logprobs = token_logprobs(first, ids[:, 0], temperature), token_logprobs(rest, rest_ids, temperature)
    if not entropy:
        return _columns(*logprobs, mask), None
    entropies = token_entropy(first, temperature), token_entropy(rest, temperature)
    return _columns(*logprobs, mask), _columns(*entropies, mask)


def _columns(first: Tensor, rest: Tensor, mask: Tensor) -> Tensor:
    """Values of first tokens (B,) and of the others, (B, C − 1) or the real ones only, as (B, C), 0 on padding."""
    if rest.dim() == 1:
        rest = rest.new_zeros(mask[:, 1:].shape).masked_scatter(mask[:, 1:], rest)
    return torch.where(mask, torch.cat([first[:, None], rest], 1), 0.0)


@torch.no_grad()
def can_share(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> bool:
    """Whether the shared prefix gives this model's log-probabilities: tried on its prompts against the dense path.

    Models whose layers mix tokens otherwise than by attention (state-space layers), or whose attention is not the
    plain one, cannot.
    """
    completion_ids = prompt_ids[:, -8:].repeat_interleave(2, 0)  # any tokens do
    tokens = Tokens(prompt_ids, prompt_mask, completion_ids, torch.ones_like(completion_ids, dtype=torch.bool))
    dense, _ = completion_logprobs(model, tokens, 1.0, shared=False)
    same = gives(lambda: completion_logprobs(model, tokens, 1.0, shared=True)[0], dense)
    if not same:
        disengage(model)
    return same
