"""Log-probabilities from the hidden states before the output layer, without holding the logits of all tokens.

A vocabulary can be large: with 49,152 entries, the logits of 1,700 tokens take 330 MB in float32, and a softmax with
its gradient reads or writes them a dozen times. Here output layer, log-softmax and entropy are one function with its
own backward pass. It computes the logits of one block of rows at a time, in the precision of the hidden states, and
processes a few rows of the block at a time in float32, so that they fit into a CPU's cache. The backward pass
computes the logits again, because this takes less time than reading stored logits from memory.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad
from transformers import PreTrainedModel

from grpo.scoring.products import product

# A block has at most this many logits. Blocks are large, because adding a block to the weight's gradient takes as
# long with 300 rows as with 1,400.
MAX_PRODUCT = 2**27
# On other devices, where a block is also processed in float32 as a whole, which takes three times as much memory.
DEVICE_MAX_PRODUCT = 2**26
# Rows are padded to a multiple of this, because oneDNN makes and keeps a kernel of 0.7 MiB for each number of rows.
ROW_MULTIPLE = 64
LOG_OF_ZERO = -1e4  # used as the logarithm of 0, because -inf times 0 would be NaN
CACHE_LOGITS = 2**19  # float32 logits that fit into a CPU's cache: 2 MiB


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that computes the hidden states before its output layer."""
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft adds this method
    return unwrapped.base_model


def is_plain(model: PreTrainedModel) -> bool:
    """Return whether the output layer is a plain nn.Linear, without an adapter and not in 4 bits."""
    return type(model.get_output_embeddings()) is nn.Linear


def linear_logprobs(layer: nn.Linear, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log softmax(layer(hidden) / temperature) of `ids`, and each row's entropy in nats, (M,) float32 each.

    `hidden` is (M, D), `ids` is (M,). The product is computed in the precision of `hidden`, everything else in
    float32. Both results have a gradient.
    """
    rows, filler = len(ids), -len(ids) % ROW_MULTIPLE
    hidden, ids = pad(hidden, (0, 0, 0, filler)), pad(ids, (0, filler))
    logprobs, entropies = _LinearLogprobs.apply(hidden, layer.weight, layer.bias, ids, temperature)
    return logprobs[:rows], entropies[:rows]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, (M,)."""
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.temperature = temperature
        logprobs = torch.zeros(len(ids), device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        for rows, logits in _logits(hidden, weight, bias):
            for few, _, block in _blocks(rows, logits, temperature):
                p = block.softmax(-1)
                top, top_ids = block.max(-1, keepdim=True)
                total = top - p.gather(-1, top_ids).log()  # log of the sum of exp(logits)
                logprobs[few] = (block.gather(-1, ids[few, None]) - total).squeeze(-1)
                entropies[few] = total.squeeze(-1) - torch.linalg.vecdot(p, block)
        ctx.set_materialize_grads(False)  # the gradient of an unused entropy is then None, not zeros
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias; each argument is (M,), or None."""
        hidden, weight, bias, ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        wide = torch.promote_types(hidden.dtype, torch.float32)  # sums over many blocks need more than 16 bits
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(ids), device=hidden.device)
        grad = grad_logprobs / ctx.temperature
        for rows, logits in _logits(hidden, weight, bias):
            for few, few_logits, block in _blocks(rows, logits, ctx.temperature):
                p = block.softmax(-1)
                weights = -grad[few, None]
                if grad_entropy is not None:  # dH/dz = -p (log p + H)
                    log_p = block.log_softmax(-1).clamp(min=LOG_OF_ZERO)
                    entropy = -torch.linalg.vecdot(p, log_p)[:, None]
                    weights = weights - (grad_entropy[few, None] / ctx.temperature) * (log_p + entropy)
                p.mul_(weights)
                p.scatter_add_(-1, ids[few, None], grad[few, None])
                few_logits.copy_(p)  # overwrite the logits with their gradient
            if needs_hidden:
                product(logits, weight, out=grad_hidden[rows])
            if needs_weight:
                part = product(logits.T, hidden[rows])
                grad_weight = part if grad_weight is None else grad_weight.to(wide).add_(part)
            if needs_bias:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits), one block of rows at a time. Each block overwrites the one before it in memory."""
    most = MAX_PRODUCT if x.device.type == "cpu" else DEVICE_MAX_PRODUCT
    blocks = math.ceil(len(x) / max(1, most // len(weight)))
    size = math.ceil(len(x) / blocks)
    memory = x.new_empty(size, len(weight))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        logits = memory[: rows.stop - rows.start]
        torch.mm(x[rows], weight.T, out=logits)
        if bias is not None:
            logits += bias.to(logits.dtype)
        yield rows, logits


def _blocks(rows: slice, logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, logits, logits / temperature in float32), a few rows at a time."""
    size = max(1, CACHE_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        few_logits = logits[start : start + size]
        block = few_logits.float() if temperature == 1 else few_logits.float() / temperature
        first = rows.start + start
        yield slice(first, first + len(block)), few_logits, block
