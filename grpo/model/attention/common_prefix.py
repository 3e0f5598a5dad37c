"""Attention of a decoding step to what all prompts begin with, held once for all rows.

With worked examples, most of each prompt is the same. Copied for each row, its keys and values are as much to read a
token as the weights of a small model; held once, all rows read the same ones, as one product of matrices. Prefix and
own part are joined by one softmax over both, so this is exact (the idea is Hydragen's, arXiv:2402.05099).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SCORES = 2**21  # scores in memory at a time, 8 MiB
# torch's own attention on a CPU returns the sums too, and takes 5 ms where scores in memory take 24 (3 heads of
# 11,400 queries, 250 keys, bfloat16). Its backward pass has no gradient for the sums, so that is done here
FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FUSED_TYPES = (torch.bfloat16, torch.float32) if FUSED else ()


@dataclass(frozen=True)
class CommonPrefix:
    """Keys and values of the S tokens that all rows begin with, by layer, (K, S, d) each, at positions 0 to S - 1."""

    keys: list[Tensor]
    values: list[Tensor]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, own_bias: Tensor, scaling: float
    ) -> Tensor:
        """Attend to the prefix and to each row's own tokens: query (B, H, L, d), key and value (B, K, T, d).

        `own_bias` (B, 1, L, T) is added to the scores of the own tokens: 0, or -inf where they are not seen. Returns
        (B, L, H, d).
        """
        (b, heads, length, size), (_, key_heads, _, _) = query.shape, key.shape
        prefix_keys, prefix_values = self.keys[layer], self.values[layer]
        repeats = heads // key_heads
        q = (query * scaling).reshape(b, key_heads, repeats * length, size)
        # all rows against the one prefix, a product for each key head
        together = q.transpose(0, 1).reshape(key_heads, -1, size)  # (K, B · R · L, d)
        scores = (together @ prefix_keys.transpose(1, 2)).view(key_heads, b, repeats * length, -1).transpose(0, 1)
        own = (q @ key.transpose(2, 3)).view(b, heads, length, -1) + own_bias
        weights = torch.cat([scores, own.view(b, key_heads, repeats * length, -1)], -1).softmax(-1).to(value.dtype)
        of_prefix, of_own = weights.split([prefix_keys.shape[1], key.shape[2]], -1)
        of_prefix = of_prefix.transpose(0, 1).reshape(key_heads, -1, prefix_keys.shape[1]) @ prefix_values
        out = of_prefix.view(key_heads, b, repeats * length, -1).transpose(0, 1) + of_own @ value
        return out.reshape(b, heads, length, -1).transpose(1, 2)


def attend_with_sums(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return attention (M, L, d) and the logarithms (M, L) of the sums that its softmax divides by, with gradients.

    Query is (M, L, d), key and value (M, T, d), bias (M or 1, L, T). With the sums, attention to two sets of keys can
    be joined to that to both of them. Scores are computed again in the backward pass and not held; products are in
    the precision of the vectors, all else in float32.
    """
    return _AttendWithSums.apply(query, key, value, bias, scaling)


class _AttendWithSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Return attention and sums."""
        ctx.scaling = scaling
        if _is_fused(query, value, bias):
            out, sums = (x[0].contiguous() for x in FUSED(query[None], key[None], value[None], scale=scaling))
            ctx.save_for_backward(query, key, value, bias, out, sums)
            return out, sums
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        sums = query.new_empty(query.shape[:2], dtype=_precise(query))
        for some in _parts(query, key):
            scores = _scores(query[some], key[some], bias, some, scaling)
            sums[some] = scores.logsumexp(-1)
            torch.bmm(_weights(scores, sums[some]).to(value.dtype), value[some], out=out[some])
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_out: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, bias, out, sums = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        of_out = of_out.contiguous()
        offset = of_sums - torch.linalg.vecdot(of_out.to(sums.dtype), out.to(sums.dtype))  # (M, L)
        for some in _parts(query, key):
            weights = _weights(_scores(query[some], key[some], bias, some, ctx.scaling), sums[some])
            torch.bmm(weights.to(value.dtype).transpose(1, 2), of_out[some], out=of_value[some])
            of_scores = (
                torch.bmm(of_out[some], value[some].transpose(1, 2)).to(sums.dtype).add_(offset[some, :, None])
            )
            of_scores = of_scores.mul_(weights).mul_(ctx.scaling).to(query.dtype)
            torch.bmm(of_scores, key[some], out=of_query[some])
            torch.bmm(of_scores.transpose(1, 2), query[some], out=of_key[some])
        return of_query, of_key, of_value, None, None


def _is_fused(query: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    """Return whether torch's own attention on a CPU can do the forward pass."""
    same_size = query.shape[-1] == value.shape[-1]
    return bias is None and same_size and query.device.type == "cpu" and query.dtype in FUSED_TYPES


def _parts(query: Tensor, key: Tensor) -> list[slice]:
    size = max(1, SCORES // (query.shape[1] * key.shape[1]))
    return [slice(start, start + size) for start in range(0, len(query), size)]


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, some: slice, scaling: float) -> Tensor:
    """Return scaled scores (m, L, T)."""
    scores = torch.bmm(query, key.transpose(1, 2)).to(_precise(query)).mul_(scaling)
    if bias is None:
        return scores
    return scores.add_(bias if len(bias) == 1 else bias[some])


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    """Return exp(scores - sums), in the place of the scores; 0 for a row that sees nothing, whose sum is -inf."""
    return scores.sub_(sums.clamp(min=torch.finfo(sums.dtype).min)[..., None]).exp_()


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
