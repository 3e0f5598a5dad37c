"""Log-probabilities of completion tokens. Column j comes from the logits at the token before completion token j.

The G completions of a group share their prompt, and prompts may share a beginning, such as a system prompt.
A scorer that shares prompts runs all real tokens as one packed row, in which the common beginning of S tokens and the
rest of each prompt appear once. The row has at most S + N · (P − S) + B · C tokens, instead of B · (P + C).
`attention/packed.py` decides which tokens attend to which. Gradients flow through all tokens of the row. In float32
the results are the same as if every row were run in full, apart from rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.runtime.device import TRAITS, has_old_torch, least_torch
from grpo.runtime.sharding import run_as_forward
from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.packed import is_enabled
from grpo.scoring.output_layer import LOG_OF_ZERO, body_of, linear_logprobs
from grpo.scoring.tokens import Tokens, last_columns, position_ids, shared_beginning, shared_from

# More logits than this are processed in chunks of this size, which take 64 MiB each in float32.
CHUNK = 2**24


@dataclass(frozen=True)
class Scorer:
    """Computes log-probabilities of completions. `probe` finds out which shortcuts a model supports."""

    shares_prompts: bool = False  # run all rows as one packed row, in which each prompt appears once
    fuses_output: bool = False  # do not hold the logits of all tokens in memory; needs `shares_prompts`

    def logprobs(self, model: PreTrainedModel, tokens: Tokens, temperature: float) -> Tensor:
        """Return log-probabilities, (B, C) float32; column j scores completion token j; 0 on padding."""
        return self.scores(model, tokens, temperature)[0]

    def scores(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        temperature: float,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-probability of each token, and the entropy of the distribution that predicts it, in nats.

        Both are (B, C) float32, and 0 on padding. Without `with_entropy`, the entropy may be None. It has a gradient
        only with `entropy_gradient`.
        """
        ids, mask = tokens.completion_ids, tokens.completion_mask
        places = packed_inputs(model, tokens)[1] if self.shares_prompts else None
        rest_ids = ids[:, 1:] if places is None else ids.flatten()[places]
        if self.fuses_output:
            logits = (len(ids) + len(places)) * model.get_output_embeddings().weight.shape[0]
            if logits > CHUNK or TRAITS[ids.device.type].max_inner:  # the plain gradient may be wrong above a limit
                logprobs, entropy = fused_scores(model, tokens, temperature)
                return logprobs, entropy if entropy_gradient else entropy.detach()
        first, rest = packed_logits(model, tokens) if self.shares_prompts else dense_logits(model, tokens)
        first_logprobs = token_logprobs(first, ids[:, 0], temperature)
        logprobs = _columns(first_logprobs, token_logprobs(rest, rest_ids, temperature), mask, places)
        if not with_entropy:
            return logprobs, None
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = token_entropy(first, temperature), token_entropy(rest, temperature)
            return logprobs, _columns(*entropies, mask, places)

    def check_gradient(self, model: PreTrainedModel) -> None:
        """Raise ValueError if training is impossible, because the device gets the output layer's gradient wrong."""
        limit = TRAITS[model.device.type].max_inner
        if self.fuses_output or limit is None or not has_old_torch(model.device):
            return
        if (size := len(model.get_output_embeddings().weight)) > limit:
            raise ValueError(
                f"on {model.device.type}, torch {torch.__version__} would compute wrong gradients of this model, "
                f"whose vocabulary has {size} entries: install torch {least_torch(model.device)} or newer, or give "
                "--device cpu"
            )


DENSE = Scorer()  # runs every row in full, which every model supports


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature) of `ids`, float32, in the shape of `ids`; logits are (…, V).

    Chunks of rows avoid a float32 copy of all logits. The backward pass computes each chunk again.
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
    """Return logits / temperature in float32; float32 logits are not copied if the temperature is 1."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the entropy (…), in nats, of softmax(logits / temperature); logits (…, V) are processed in chunks."""
    rows = max(1, CHUNK // max(1, logits.shape[1:].numel()))
    parts = [checkpoint(_token_entropy, chunk, temperature, use_reentrant=False) for chunk in logits.split(rows)]
    return torch.cat(parts)


def _token_entropy(logits: Tensor, temperature: float) -> Tensor:
    logits = scaled(logits, temperature)
    p = logits.softmax(-1)
    if not torch.is_grad_enabled():
        return torch.special.entr(p).sum(-1)  # `entr` is 0 at probability 0, even if the logit is -inf
    # `entr` is not used here, because its gradient at 0 is infinite.
    return -(p * logits.log_softmax(-1).clamp(min=LOG_OF_ZERO)).sum(-1)


def packed_inputs(model: PreTrainedModel, tokens: Tokens) -> tuple[dict[str, Any], Tensor]:
    """Return the keyword arguments of a forward pass over prompts and completions as one row, ordered as in `Layout`.

    Return also where the M completion tokens that are not the first of their completion are among all B · C, (M,).
    The last token of a completion is not in the row, because it predicts nothing that is scored. Everything is made
    on the CPU, where reading a mask does not wait for the device, and only once for these tokens.
    """
    assert is_enabled(model)  # any other attention would ignore `layout`
    least = shared_from(model)
    if least in tokens.packed:
        return tokens.packed[least]
    host, device = tokens.on_host or tokens.to("cpu"), tokens.prompt_ids.device
    ids = host.completion_ids[:, :-1]  # (B, C - 1)
    is_input = host.completion_mask[:, 1:]  # (B, C - 1): completion tokens that another one follows
    is_prompt = host.prompt_mask  # (N, P)
    lengths = is_prompt.sum(-1)
    common = shared_beginning(host.prompt_ids, is_prompt, least)
    layout = Layout.of(lengths, is_input.sum(-1), common, device)
    positions = position_ids(is_prompt)
    follows = (is_prompt & (positions >= common))[:, :-1]  # after the common beginning, without the last token
    starts = lengths.repeat_interleave(tokens.num_generations)[:, None]
    completion_positions = starts + torch.arange(ids.shape[1])  # (B, C - 1)

    def row(of_prompts: Tensor, of_completions: Tensor) -> Tensor:
        """Return values (N, P) and (B, C − 1) as one row (1, T), on the device."""
        parts = [
            of_prompts[0, is_prompt[0]][:common],
            of_prompts[0, -1:].expand(layout.filler),
            of_prompts[:, :-1][follows],
            of_prompts[:, -1],  # prompts are padded on the left
            of_completions[is_input],
        ]
        return torch.cat(parts)[None].to(device)

    arguments = {
        "input_ids": row(host.prompt_ids, ids),
        "position_ids": row(positions, completion_positions),
        "attention_mask": ids.new_zeros(1, 1, 1, 1, device=device),  # ignored; else the model would build a mask
        "use_cache": False,
        "layout": layout,
    }
    places = pad(is_input, (1, 0)).flatten().nonzero().squeeze(-1).to(device)
    tokens.packed[least] = arguments, places
    return tokens.packed[least]


def packed_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Run a packed row; return the logits of each completion's first token (B, V) and of M later tokens (M, V)."""
    inputs, places = packed_inputs(model, tokens)
    prompts = len(tokens.prompt_ids)
    logits = model(**inputs, logits_to_keep=prompts + len(places)).logits[0]  # (N + M, V)
    first, rest = logits.tensor_split([prompts])
    return first.repeat_interleave(tokens.num_generations, 0), rest


def fused_scores(model: PreTrainedModel, tokens: Tokens, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, (B, C) each, from a packed row, without holding all logits."""
    inputs, places = packed_inputs(model, tokens)
    ids, mask = tokens.completion_ids, tokens.completion_mask
    targets = torch.cat([ids[:, 0], ids.flatten()[places]])  # (B + M,)
    prompts = len(tokens.prompt_ids)
    scored = prompts + len(places)  # N + M

    def score() -> tuple[Tensor, Tensor]:
        hidden = body_of(model)(**inputs).last_hidden_state[0, -scored:]  # (N + M, D)
        first, rest = hidden.tensor_split([prompts])
        rows = torch.cat([first.repeat_interleave(tokens.num_generations, 0), rest])
        return linear_logprobs(model.get_output_embeddings(), rows, targets, temperature)

    logprobs, entropies = (x.tensor_split([len(ids)]) for x in run_as_forward(model, score))
    return _columns(*logprobs, mask, places), _columns(*entropies, mask, places)


def dense_logits(model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Run full rows; return the logits of each completion's first token (B, V) and of later tokens (B, C − 1, V)."""
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


def _columns(first: Tensor, rest: Tensor, mask: Tensor, places: Tensor | None) -> Tensor:
    """Join values of the first tokens (B,) and of the others into (B, C); 0 on padding.

    The others are (B, C − 1), or (M,) if `places` (M,) tells where they are among all B · C.
    """
    if places is not None:
        rest = rest.new_zeros(mask.numel()).scatter(0, places, rest).view_as(mask)[:, 1:]
    return torch.where(mask, torch.cat([first[:, None], rest], 1), 0.0)
