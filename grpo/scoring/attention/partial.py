"""Attention to a part of the keys that a query sees, the gradients of this attention, and how two parts are joined.

Attention to several sets of keys is a weighted mean of the attention to each set. A set's weight is the sum that its
softmax divides by. From the joint result and the joint sums, the gradients of each part are computed separately. The
backward pass computes the scores again. Products are in the precision of the vectors, everything else is in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor
from torch.nn.functional import threshold_

from grpo.scoring.products import product

SCORES = 2**21  # At most this many attention scores are held in memory at a time: 8 MiB in float32.
# Lower exponents are raised to this, because a CPU takes 10 to 30 times as long for results that underflow.
LOWEST_EXPONENT = -80.0
# Torch's own attention on a CPU is faster than holding the scores in memory. It returns the logarithms of the softmax
# sums, and its backward pass accepts the joint sums. With a bias, its backward pass is slower and not used (see
# README.md).
FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FUSED_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
FUSED_TYPES = (torch.bfloat16, torch.float32) if FUSED and FUSED_BACKWARD else ()


@dataclass(frozen=True)
class PartialAttention:
    """Attention of queries (M, L, d) to a part of the keys that they see, (M, T, d), and the values of these keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None  # (M or 1, L, T), made by `as_bias`, added to the scores
    scaling: float

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the attention (M, L, d) and the logarithms (M, L) of the sums that its softmax divides by.

        If a query sees none of the keys, its logarithm is so low that `joined` gives this attention a weight of 0.
        """
        if self._is_fused():
            mask = None if self.bias is None else self.bias.to(self.query.dtype)[None]
            out, sums = FUSED(self.query[None], self.key[None], self.value[None], attn_mask=mask, scale=self.scaling)
            return out[0].contiguous(), sums[0].contiguous()
        out = self.query.new_empty(*self.query.shape[:2], self.value.shape[-1])
        sums = self.query.new_empty(self.query.shape[:2], dtype=_wide(self.query))
        for rows, scores in self._scores():
            sums[rows] = scores.logsumexp(-1)
            weights = _weights(scores, sums[rows])
            product(weights.to(self.value.dtype), self.value[rows], out=out[rows])
        return out, sums

    def gradients(self, grad_out: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value that come from this part of the keys.

        `out` (M, L, d) is the joint result and `grad_out` its gradient, both contiguous. `sums` (M, L) are the
        logarithms of the joint sums; a query with inf in `sums` gets no gradient.
        """
        if self._is_fused() and self.bias is None:
            vectors = (x[None] for x in (grad_out, self.query, self.key, self.value, out, sums))
            grad_query, grad_key, grad_value = FUSED_BACKWARD(*vectors, 0.0, False, scale=self.scaling)
            return grad_query[0], grad_key[0], grad_value[0]
        grad_query = torch.empty_like(self.query)
        grad_key = torch.empty_like(self.key)
        grad_value = torch.empty_like(self.value)
        inner = torch.linalg.vecdot(grad_out.to(sums.dtype), out.to(sums.dtype))  # (M, L)
        for rows, scores in self._scores():
            weights = _weights(scores, sums[rows])
            product(weights.to(self.value.dtype).transpose(1, 2), grad_out[rows], out=grad_value[rows])
            grad_scores = torch.bmm(grad_out[rows], self.value[rows].transpose(1, 2)).to(sums.dtype)
            grad_scores = grad_scores.sub_(inner[rows, :, None]).mul_(weights).mul_(self.scaling).to(self.query.dtype)
            product(grad_scores, self.key[rows], out=grad_query[rows])
            product(grad_scores.transpose(1, 2), self.query[rows], out=grad_key[rows])
        return grad_query, grad_key, grad_value

    def _is_fused(self) -> bool:
        """Return whether torch's own attention on a CPU supports these vectors."""
        same_size = self.query.shape[-1] == self.value.shape[-1]
        return self.query.device.type == "cpu" and same_size and self.query.dtype in FUSED_TYPES

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, scaled scores (m, L, T)), one block of m rows at a time."""
        size = max(1, SCORES // (self.query.shape[1] * self.key.shape[1]))
        for start in range(0, len(self.query), size):
            rows = slice(start, start + size)
            scores = torch.bmm(self.query[rows], self.key[rows].transpose(1, 2)).to(_wide(self.query))
            scores.mul_(self.scaling)
            if self.bias is not None:
                scores.add_(self.bias if len(self.bias) == 1 else self.bias[rows])
            yield rows, scores


def joined(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention (…, d) and log-sums (…) of two parts together; each part is given as `run` returns it."""
    share = torch.sigmoid(other_sums - sums)[..., None]  # the weight of the other part in the joint softmax
    return torch.lerp(out, other, share.to(out.dtype)), torch.logaddexp(sums, other_sums)


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    """Overwrite the scores with exp(scores - sums) and return them; results below 4e-35 become 0."""
    weights = scores.sub_(sums[..., None]).clamp_(min=LOWEST_EXPONENT).exp_()
    return threshold_(weights, 2 * exp(LOWEST_EXPONENT), 0.0)


def _wide(x: Tensor) -> torch.dtype:
    """Return the type of scores and sums: float64 for vectors in float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)
