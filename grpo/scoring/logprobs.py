"""Per-token log-probabilities of completions. The shift by one is here and nowhere else.

All G completions of a group share their prompt, and prompts begin alike: with a system prompt, with worked examples.
`packed_logits` runs them through the model as one row of real tokens, with gradient: a common beginning of S tokens
once, the rest of each prompt once, about S + N · (P - S) + B · C tokens instead of B · (P + C), exact in float32;
`packed_attention.py` decides who attends to whom. `dense_logits` runs every row in full: the oracle of the tests, and
the fallback for models that do not support packing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.packed import enable
from grpo.scoring.output_layer import CHUNK, LEAST_LOG, fused_logprobs
from grpo.scoring.tokens import Tokens, last_columns, position_ids, shared_beginning


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of `ids`, float32, in the shape of `ids`; logits are (…, V).

    Rows are processed in chunks, so that no float32 copy of all logits is held; the backward pass recomputes each.
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
    logits = scaled(logits, temperature)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in float32, without a pass over them to divide by 1."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the entropy of softmax(logits / temperature), nats; (…, V) to (…). Rows are processed in chunks."""
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
    parts = [checkpoint(_token_entropy, some, temperature, use_reentrant=False) for some in logits.split(rows)]
    return torch.cat(parts)


def _token_entropy(logits: Tensor, temperature: float) -> Tensor:
    logits = scaled(logits, temperature)
    p = logits.softmax(-1)
    if not torch.is_grad_enabled():
        return torch.special.entr(p).sum(-1)  # 0 for a token of probability 0, whose logit may be -inf
    return -(p * logits.log_softmax(-1).clamp(min=LEAST_LOG)).sum(-1)  # the gradient of entr at 0 is infinite


def packed_inputs(model: PreTrainedModel, tokens: Tokens) -> dict[str, Any]:
    """Return what a model is called with to score completions: one row, of which the last N + M tokens are read."""
    ids, prompts, inputs = tokens.completion_ids[:, :-1], tokens.prompt_mask, tokens.completion_mask[:, 1:]
    common = shared_beginning(model, tokens.prompt_ids, prompts)
    layout = Layout.of(prompts.sum(-1), inputs.sum(-1), common)
    n, positions = len(prompts), position_ids(prompts)  # (N, P)
    beginning = prompts & (positions < common)  # of all prompts, (N, P); that of the first is taken
    own = (prompts & ~beginning)[:, :-1]
    starts = prompts.sum(-1).repeat_interleave(tokens.num_generations)[:, None]
    own_positions = starts + torch.arange(ids.shape[1], device=ids.device)  # (B, C - 1)
    # in the order of the layout; prompts are left-padded, so the last column has the last token of each
    input_ids, packed_positions = (
        [
            of_prompts[0][beginning[0]],
            of_prompts[0, -1:].expand(layout.filler),
            of_prompts[:, :-1][own],
            of_prompts[:, -1],
            of_completions[inputs],
        ]
        for of_prompts, of_completions in ((tokens.prompt_ids, ids), (positions, own_positions))
    )
    return {
        "input_ids": torch.cat(input_ids)[None],
        "position_ids": torch.cat(packed_positions)[None],
        "attention_mask": ids.new_zeros(1, 1, 1, 1),  # ignored; with it the model builds no mask of its own
        "use_cache": False,
        "logits_to_keep": n + len(input_ids[-1]),
        "layout": layout,
    }


def packed_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return logits of the first completion tokens, one a prompt (N, V), and of the other real tokens (M, V)."""
    enable(model)
    return _first_and_rest(model(**packed_inputs(model, tokens)).logits, tokens)


def _packed_scores(model: PreTrainedModel, tokens: Tokens, temperature: float) -> tuple[Tensor, Tensor] | None:
    """Return log-probabilities and entropies of the tokens to score, (B + M,), without logits of all in memory.

    None where `fused_logprobs` cannot or need not do that.
    """
    enable(model)
    ids, real = tokens.completion_ids, tokens.completion_mask[:, 1:]

    def rows(hidden: Tensor) -> Tensor:
        first, rest = _first_and_rest(hidden, tokens)
        return torch.cat([first.repeat_interleave(tokens.num_generations, 0), rest])

    targets = torch.cat([ids[:, 0], ids[:, 1:][real]])
    return fused_logprobs(model, lambda: packed_inputs(model, tokens), rows, targets, temperature)


def _first_and_rest(read: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Split what is read of a packed row, (1, N + M, …), into that of the prompts and of the completions."""
    first, rest = read[0].tensor_split([len(tokens.prompt_ids)])
    return first, rest


def dense_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return logits of the first completion tokens (B, V) and of the others (B, C − 1, V), every row run in full."""
    inputs = tokens.completion_ids[:, :-1]
    prompt_ids = tokens.prompt_ids.repeat_interleave(tokens.num_generations, 0)
    prompt_mask = tokens.prompt_mask.repeat_interleave(tokens.num_generations, 0)
    mask = torch.cat([prompt_mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
    out = model(
        input_ids=torch.cat([prompt_ids, inputs], 1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=last_columns(mask, inputs.shape[1] + 1),
    )
    return out.logits[:, 0], out.logits[:, 1:]


def completion_logprobs(
    model: PreTrainedModel,
    tokens: Tokens,
    temperature: float,
    *,
    packed: bool = True,
    entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities of the completions' tokens, (B, C) float32; column j scores completion token j.

    With `entropy`, also return the entropy of the distribution of each token, nats, (B, C), with a gradient if
    `entropy_gradient`; else None. Both are 0 on padding.
    """
    ids, mask = tokens.completion_ids, tokens.completion_mask
    if packed and (scores := _packed_scores(model, tokens, temperature)):
        logprobs, entropies = (_columns(*x.tensor_split([len(ids)]), mask) for x in scores)
        entropies = entropies if entropy_gradient else entropies.detach()
        return logprobs, entropies if entropy else None
    if packed:
        first, rest = packed_logits(model, tokens)
        first, rest_ids = first.repeat_interleave(tokens.num_generations, 0), ids[:, 1:][mask[:, 1:]]
    else:
        first, rest = dense_logits(model, tokens)
        rest_ids = ids[:, 1:]
    logprobs = token_logprobs(first, ids[:, 0], temperature), token_logprobs(rest, rest_ids, temperature)
    if not entropy:
        return _columns(*logprobs, mask), None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = token_entropy(first, temperature), token_entropy(rest, temperature)
    return _columns(*logprobs, mask), _columns(*entropies, mask)


def _columns(first: Tensor, rest: Tensor, mask: Tensor) -> Tensor:
    """Join values of first tokens (B,) and of others, (B, C − 1) or real ones only (M,), to (B, C), 0 on padding."""
    if rest.dim() == 1:
        rest = rest.new_zeros(mask[:, 1:].shape).masked_scatter(mask[:, 1:], rest)
    return torch.where(mask, torch.cat([first[:, None], rest], 1), 0.0)
