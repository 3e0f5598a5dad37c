"""Attention to a part of the keys that a query sees, to be joined with that to the others, and its gradients.

Attention to several sets of keys is the mean of that to each, weighted by the sums that their softmaxes divide by.
With the joint result and the joint sums, the gradients of each part can be taken alone, and added up. Scores are
computed again in the backward pass and not held; products are in the precision of the vectors, all else in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor
from torch.nn.functional import threshold_

SCORES = 2**21  # scores in memory at a time, 8 MiB
LOWEST = -80.0  # of exponents: where many results underflow, a CPU takes 10 to 30 times as long
# torch's own attention on a CPU returns the sums too, and takes 5 ms where scores in memory take 24 (3 heads of
# 11,400 queries, 250 keys, bfloat16); 26 instead of 33 in the backward pass, which takes joint sums. With a bias (192
# of 96 queries, 56 keys) it takes 8 ms instead of 32, but 50 instead of 17 in the backward pass
FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FUSED_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
FUSED_TYPES = (torch.bfloat16, torch.float32) if FUSED and FUSED_BACKWARD else ()


@dataclass(frozen=True)
class PartialAttention:
    """Attention of queries (M, L, d) to some of the keys that they see, (M, T, d), with their values (M, T, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None  # (M or 1, L, T), added to the scores, of `as_bias`
    scaling: float

    def run(self) -> tuple[Tensor, Tensor]:
        """Return attention (M, L, d) and the logarithms (M, L) of the sums that its softmax divides by.

        For a query that sees none of the keys the latter are so low that they have no part in a join.
        """
        if self._is_fused():
            mask = None if self.bias is None else self.bias.to(self.query.dtype)[None]
            vectors = (x[None] for x in (self.query, self.key, self.value))
            found = FUSED(*vectors, attn_mask=mask, scale=self.scaling)
            out, sums = (x[0].contiguous() for x in found)
            return out, sums
        out = self.query.new_empty(*self.query.shape[:2], self.value.shape[-1])
        sums = self.query.new_empty(self.query.shape[:2], dtype=_precise(self.query))
        for some, scores in self._scores():
            sums[some] = scores.logsumexp(-1)
            weights = _weights(scores, sums[some])
            torch.bmm(weights.to(self.value.dtype), self.value[some], out=out[some])
        return out, sums

    def gradients(self, of_out: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this part's gradients of query, key and value, from that of the joint result.

        `of_out` and `out` (M, L, d) are the gradient of the joint result and itself, contiguous; `sums` (M, L) the
        logarithms of the joint sums, inf for a query without a result, which gets no gradient.
        """
        if self._is_fused() and self.bias is None:
            vectors = (x[None] for x in (of_out, self.query, self.key, self.value, out, sums))
            of_query, of_key, of_value = FUSED_BACKWARD(*vectors, 0.0, False, scale=self.scaling)
            return of_query[0], of_key[0], of_value[0]
        of_query, of_key, of_value = (torch.empty_like(x) for x in (self.query, self.key, self.value))
        inner = torch.linalg.vecdot(of_out.to(sums.dtype), out.to(sums.dtype))  # (M, L)
        for some, scores in self._scores():
            weights = _weights(scores, sums[some])
            torch.bmm(weights.to(self.value.dtype).transpose(1, 2), of_out[some], out=of_value[some])
            of_scores = torch.bmm(of_out[some], self.value[some].transpose(1, 2)).to(sums.dtype)
            of_scores = of_scores.sub_(inner[some, :, None]).mul_(weights).mul_(self.scaling).to(self.query.dtype)
            torch.bmm(of_scores, self.key[some], out=of_query[some])
            torch.bmm(of_scores.transpose(1, 2), self.query[some], out=of_key[some])
        return of_query, of_key, of_value

    def _is_fused(self) -> bool:
        """Return whether torch's own attention on a CPU can do this."""
        on_cpu, same_size = self.query.device.type == "cpu", self.query.shape[-1] == self.value.shape[-1]
        return on_cpu and same_size and self.query.dtype in FUSED_TYPES

    def _scores(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield scaled scores (m, L, T) of some rows after the other."""
        size = max(1, SCORES // (self.query.shape[1] * self.key.shape[1]))
        for start in range(0, len(self.query), size):
            some = slice(start, start + size)
            scores = torch.bmm(self.query[some], self.key[some].transpose(1, 2)).to(_precise(self.query))
            scores.mul_(self.scaling)
            if self.bias is not None:
                scores.add_(self.bias if len(self.bias) == 1 else self.bias[some])
            yield some, scores


def joined(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention (…, d) to two sets of keys and its sums (…), from those to each."""
    share = torch.sigmoid(other_sums - sums)[..., None]  # of the other in the joint softmax
    return torch.lerp(out, other, share.to(out.dtype)), torch.logaddexp(sums, other_sums)


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    """Return exp(scores - sums), in the place of the scores; 0 where that is less than 3e-35."""
    weights = scores.sub_(sums[..., None]).clamp_(min=LOWEST).exp_()
    return threshold_(weights, 2 * exp(LOWEST), 0.0)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
