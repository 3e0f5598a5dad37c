"""Per-token log-probabilities of completions. The shift by one is here and nowhere else.

All G completions of a group share their prompt, and prompts begin alike: with a system prompt, with worked examples.
A scorer that shares prompts runs them through the model as one packed row of real tokens, with gradient: a common
beginning of S tokens once, the rest of each prompt once. That is about S + N · (P − S) + B · C tokens instead of
B · (P + C), and exact in float32; `attention/packed.py` decides who attends to whom. The default runs every row in
full. It is the oracle of the tests, and the fallback for models that cannot share prompts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.runtime.sharding import run_as_forward
from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.packed import enable
from grpo.scoring.output_layer import CHUNK, LOG_OF_ZERO, body_of, linear_logprobs
from grpo.scoring.tokens import Tokens, last_columns, position_ids, shared_beginning


@dataclass(frozen=True)
class Scorer:
    """Computes log-probabilities of completions. Which shortcuts a model allows is probed once, when it is loaded."""

    shares_prompts: bool = False  # run all rows as one packed row, and each prompt once
    fuses_output: bool = False  # with shared prompts: never hold the logits of all tokens in memory

    def logprobs(self, model: PreTrainedModel, tokens: Tokens, temperature: float) -> Tensor:
        """Return log-probabilities, (B, C) float32; column j scores completion token j; 0 on padding."""
        if self._is_fused(model, tokens):
            return fused_scores(model, tokens, temperature)[0]
        first, rest = self._logits(model, tokens)
        return _logprobs_of(first, rest, tokens, temperature)

    def logprobs_and_entropies(
        self, model: PreTrainedModel, tokens: Tokens, temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities, and the entropy of the distribution of each token, nats: (B, C) float32 each.

        Both are 0 on padding. The entropies have a gradient only with `entropy_gradient`.
        """
        if self._is_fused(model, tokens):
            logprobs, entropies = fused_scores(model, tokens, temperature)
            return logprobs, entropies if entropy_gradient else entropies.detach()
        first, rest = self._logits(model, tokens)
        logprobs = _logprobs_of(first, rest, tokens, temperature)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = token_entropy(first, temperature), token_entropy(rest, temperature)
            return logprobs, _columns(*entropies, tokens.completion_mask)

    def _is_fused(self, model: PreTrainedModel, tokens: Tokens) -> bool:
        """Return whether the logits are too many to be held, all at once."""
        if not (self.shares_prompts and self.fuses_output):
            return False
        scored = len(tokens.completion_ids) + int(tokens.completion_mask[:, 1:].sum())
        return scored * model.get_output_embeddings().weight.shape[0] > CHUNK

    def _logits(self, model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return logits of the first tokens, (B, V), and of the others: of the M real ones, or (B, C − 1, V)."""
        if not self.shares_prompts:
            return dense_logits(model, tokens)
        first, rest = packed_logits(model, tokens)
        return first.repeat_interleave(tokens.num_generations, 0), rest


DENSE = Scorer()  # right for any model


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of `ids`, float32, in the shape of `ids`; logits are (…, V).

    Rows are processed in chunks, so that no float32 copy of all logits is held; the backward pass recomputes each.
    """
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
    if rows >= logits.shape[0]:
        return _token_logprobs(logits, ids, temperature)
    chunks = zip(logits.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(_token_logprobs, *chunk, temperature, use_reentrant=False) for chunk in chunks])


def _token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    logits = scaled(logits, temperature)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in float32; a temperature of 1 costs no pass over them."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the entropy of softmax(logits / temperature), nats; (…, V) to (…). Rows are processed in chunks."""
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
    parts = [checkpoint(_token_entropy, chunk, temperature, use_reentrant=False) for chunk in logits.split(rows)]
    return torch.cat(parts)


def _token_entropy(logits: Tensor, temperature: float) -> Tensor:
    logits = scaled(logits, temperature)
    p = logits.softmax(-1)
    if not torch.is_grad_enabled():
        return torch.special.entr(p).sum(-1)  # 0 for a token of probability 0, whose logit may be -inf
    # the gradient of entr at 0 is infinite
    return -(p * logits.log_softmax(-1).clamp(min=LOG_OF_ZERO)).sum(-1)


def packed_inputs(model: PreTrainedModel, tokens: Tokens) -> dict[str, Any]:
    """Return what a model is called with to score completions as one row.

    The row, in the order of `Layout`:

        [common beginning S][filler][prompts without their last token][last token of each prompt][completion tokens]

    The model needs no last token of a completion as input, for it predicts nothing.
    """
    ids = tokens.completion_ids[:, :-1]  # (B, C - 1)
    inputs = tokens.completion_mask[:, 1:]  # which of them are followed by a token to score
    prompts = tokens.prompt_mask
    common = shared_beginning(model, tokens.prompt_ids, prompts)
    layout = Layout.of(prompts.sum(-1), inputs.sum(-1), common)
    positions = position_ids(prompts)  # (N, P)
    beginning = prompts & (positions < common)  # in all prompts, (N, P); the first one's is taken
    own = (prompts & ~beginning)[:, :-1]
    starts = prompts.sum(-1).repeat_interleave(tokens.num_generations)[:, None]
    completion_positions = starts + torch.arange(ids.shape[1], device=ids.device)  # (B, C - 1)

    def row(of_prompts: Tensor, of_completions: Tensor) -> Tensor:
        """Return (N, P) and (B, C − 1) values as one row; prompts are left-padded, so their last column is real."""
        parts = [
            of_prompts[0][beginning[0]],
            of_prompts[0, -1:].expand(layout.filler),
            of_prompts[:, :-1][own],
            of_prompts[:, -1],
            of_completions[inputs],
        ]
        return torch.cat(parts)[None]

    return {
        "input_ids": row(tokens.prompt_ids, ids),
        "position_ids": row(positions, completion_positions),
        "attention_mask": ids.new_zeros(1, 1, 1, 1),  # ignored; with it the model builds no mask of its own
        "use_cache": False,
        "layout": layout,
    }


def packed_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return logits of the first completion tokens, one a prompt (N, V), and of the other real tokens (M, V)."""
    enable(model)
    kept = _scored_tokens(tokens)
    return _first_and_rest(model(**packed_inputs(model, tokens), logits_to_keep=kept).logits, tokens)


def fused_scores(model: PreTrainedModel, tokens: Tokens, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, (B, C) each, from the hidden states before the output layer."""
    enable(model)
    inputs = packed_inputs(model, tokens)
    ids, real = tokens.completion_ids, tokens.completion_mask[:, 1:]
    targets = torch.cat([ids[:, 0], ids[:, 1:][real]])  # (B + M,)

    def score() -> tuple[Tensor, Tensor]:
        hidden = body_of(model)(**inputs).last_hidden_state  # (1, T, D)
        first, rest = _first_and_rest(hidden[:, -_scored_tokens(tokens) :], tokens)
        rows = torch.cat([first.repeat_interleave(tokens.num_generations, 0), rest])
        return linear_logprobs(model.get_output_embeddings(), rows, targets, temperature)

    scores = run_as_forward(model, score)
    logprobs, entropies = (_columns(*x.tensor_split([len(ids)]), tokens.completion_mask) for x in scores)
    return logprobs, entropies


def _scored_tokens(tokens: Tokens) -> int:
    """Return N + M: how many tokens at the end of a packed row predict a completion token."""
    return len(tokens.prompt_ids) + int(tokens.completion_mask[:, 1:].sum())


def _first_and_rest(read: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Split the end of a packed row, (1, N + M, …), into the last tokens of the prompts and the completion tokens."""
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


def _logprobs_of(first: Tensor, rest: Tensor, tokens: Tokens, temperature: float) -> Tensor:
    """Return log-probabilities (B, C) from logits of the first tokens (B, V) and of the others (M or B, C − 1, V)."""
    ids, mask = tokens.completion_ids, tokens.completion_mask
    rest_ids = ids[:, 1:][mask[:, 1:]] if rest.dim() == 2 else ids[:, 1:]
    first_logprobs = token_logprobs(first, ids[:, 0], temperature)
    return _columns(first_logprobs, token_logprobs(rest, rest_ids, temperature), mask)


def _columns(first: Tensor, rest: Tensor, mask: Tensor) -> Tensor:
    """Join values of first tokens (B,) and of the others, (B, C − 1) or the M real ones, to (B, C); 0 on padding."""
    if rest.dim() == 1:
        rest = rest.new_zeros(mask[:, 1:].shape).masked_scatter(mask[:, 1:], rest)
    return torch.where(mask, torch.cat([first[:, None], rest], 1), 0.0)
