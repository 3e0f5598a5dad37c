"""Log-probabilities of tokens from the hidden states before the output layer, without logits of all tokens in memory.

A small model has a large vocabulary: 49,152 entries at 576 hidden units make the logits of 1,700 tokens 330 MB in
float32, and a softmax with its gradient passes over them a dozen times. Here output layer, log-softmax and entropy
are one function with a backward pass by hand: some rows of logits at a time, in the precision of the product, and of
those a few in float32 that fit into a CPU's cache. The backward pass computes the logits again: a product is cheap
where reading its result is not.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad
from transformers import PreTrainedModel

from grpo.runtime.console import say

CHUNK = 2**24  # fewer logits are held, all at once
# logits of a product at most; the weight's gradient is a sum of parts, and one of 300 rows takes as long as of 1,400
PRODUCT = 2**27
ROWS = 64  # their number is rounded up to a multiple: oneDNN makes kernels of 0.7 MiB for each, and keeps them
LEAST_LOG = -1e4  # stands for the logarithm of 0, to be multiplied by 0
IN_CACHE = 2**19  # logits in float32 on a CPU: 2 MiB
_PLAIN: WeakSet[nn.Module] = WeakSet()  # output layers whose logits the model changes afterwards


def fused_logprobs(
    model: PreTrainedModel,
    inputs: Callable[[], dict[str, Any]],
    rows: Callable[[Tensor], Tensor],
    ids: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor] | None:
    """Return log-probabilities and entropies of `ids`, (M,) each, from a pass over `inputs()`.

    `rows` picks the hidden states to score, (M, D), of those before the output layer. None for an output layer of
    another kind (an adapter, 4 bits), for a model that changes its logits afterwards (a softcap), and for logits that
    are few enough to be held.
    """
    layer = model.get_output_embeddings()
    plain = type(layer) is not nn.Linear or "forward" in vars(layer) or layer in _PLAIN
    if plain or len(ids) * layer.weight.shape[0] <= CHUNK:
        return None
    scores: list[Tensor] = []
    version: list[int] = []  # counts changes in place

    def score(hidden: Tensor) -> Tensor:
        scores[:] = linear_logprobs(layer, rows(hidden), ids, temperature)
        version.append(scores[0]._version)
        return scores[0]

    layer.forward = score  # its hooks, such as those of sharding, stay
    try:
        found = model(**inputs()).logits
    finally:
        del layer.forward
    if found is scores[0] and [found._version] == version:
        return scores[0], scores[1]
    _PLAIN.add(layer)
    say("This model changes its logits, so they are all held in memory.")
    return None


def linear_logprobs(layer: nn.Linear, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log softmax(layer(hidden) / temperature) of `ids`, and the entropy of each row, nats: (M,) float32.

    `hidden` is (M, D), `ids` (M,). The product is in their own precision, all else in float32. The entropy has a
    gradient too.
    """
    rows, filler = len(ids), -len(ids) % ROWS
    hidden, ids = pad(hidden, (0, 0, 0, filler)), pad(ids, (0, filler))
    logprobs, entropies = _LinearLogprobs.apply(hidden, layer.weight, layer.bias, ids, temperature)
    return logprobs[:rows], entropies[:rows]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, (M,)."""
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.temperature = temperature
        logprobs, entropies = (torch.zeros(len(ids), device=hidden.device) for _ in range(2))
        for rows, logits in _logits(hidden, weight, bias):
            for some, block in _blocks(rows, logits, temperature):
                p, (top, at) = block.softmax(-1), block.max(-1, keepdim=True)
                total = top - p.gather(-1, at).log()  # log of the sum of exp(logits)
                logprobs[some] = (block.gather(-1, ids[some, None]) - total).squeeze(-1)
                entropies[some] = total.squeeze(-1) - torch.linalg.vecdot(p, block)
        ctx.set_materialize_grads(False)  # the entropy is often not a part of the loss
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias; both arguments are (M,) or None."""
        hidden, weight, bias, ids = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        # sums of many parts, so not in 16 bits
        precise = torch.promote_types(hidden.dtype, torch.float32)
        of_weight = None
        of_bias = torch.zeros_like(bias, dtype=precise) if for_bias else None
        grad = torch.zeros(len(ids), device=hidden.device) if grad is None else grad / ctx.temperature
        for rows, logits in _logits(hidden, weight, bias):
            for some, block in _blocks(rows, logits, ctx.temperature):
                p = block.softmax(-1)
                weights = -grad[some, None]
                if of_entropy is not None:  # dH/dz = -p (log p + H)
                    log_p = block.log_softmax(-1).clamp(min=LEAST_LOG)
                    entropy = -torch.linalg.vecdot(p, log_p)[:, None]
                    weights = weights - (of_entropy[some, None] / ctx.temperature) * (log_p + entropy)
                p.mul_(weights)
                p.scatter_add_(-1, ids[some, None], grad[some, None])
                logits[some.start - rows.start : some.stop - rows.start] = p  # their gradient, in their place
            if for_hidden:
                torch.mm(logits, weight, out=of_hidden[rows])
            if for_weight:
                part = logits.T @ hidden[rows]
                of_weight = part if of_weight is None else of_weight.to(precise).add_(part)
            if for_bias:
                of_bias += logits.sum(0, dtype=of_bias.dtype)
        if for_weight:
            of_weight = weight.new_zeros(weight.shape) if of_weight is None else of_weight.to(weight.dtype)
        of_bias = of_bias.to(bias.dtype) if for_bias else None
        return of_hidden, of_weight, of_bias, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of some rows after the other, in parts of equal size, all in the same memory."""
    parts = math.ceil(len(x) / max(1, PRODUCT // len(weight)))
    size = max(1, math.ceil(len(x) / max(1, parts)))
    memory = x.new_empty(size, len(weight))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        logits = memory[: rows.stop - rows.start]
        torch.mm(x[rows], weight.T, out=logits)
        if bias is not None:
            logits += bias.to(logits.dtype)
        yield rows, logits


def _blocks(rows: slice, logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield logits / temperature of a few rows after the other, in float32."""
    size = max(1, IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        block = logits[start : start + size].float()
        yield (
            slice(rows.start + start, rows.start + start + len(block)),
            (block if temperature == 1 else block / temperature),
        )
