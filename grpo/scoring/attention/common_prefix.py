"""Attention in decoding to what all prompts begin with, held once for all rows.

With worked examples, most of each prompt is the same. Copied for each row, its keys and values are as much to read a
token as the weights of a small model; held once, all rows read the same ones, as one product of matrices. Prefix and
own part are joined by the sums of their softmaxes, so this is exact (the idea is Hydragen's, arXiv:2402.05099).
"""

from dataclasses import dataclass

from torch import Tensor

from grpo.scoring.attention.layout import as_bias
from grpo.scoring.attention.partial import PartialAttention, joined


@dataclass(frozen=True)
class CommonPrefix:
    """Keys and values of the S tokens that all rows begin with, by layer, (K, S, d) each, at positions 0 to S - 1."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """S."""
        return self.keys[0].shape[1]

    def bias(self, seen: Tensor) -> Tensor:
        """Return `own_bias` of `attend`, from which own tokens each sees, (B, L, T): a model leaves it as it is."""
        return as_bias(seen, self.keys[0].dtype)[:, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, own_bias: Tensor, scaling: float
    ) -> Tensor:
        """Attend to the prefix and to each row's own tokens: query (B, H, L, d), key and value (B, K, T, d).

        `own_bias` (B, 1, L, T) is added to the scores of the own tokens, see `as_bias`. Returns (B, L, H, d).
        """
        (b, heads, length, size), key_heads = query.shape, key.shape[1]
        q = query.reshape(b, key_heads, -1, size)  # the R heads of a key as rows of one matrix
        # all rows against the one prefix, a product for each key head
        together = q.transpose(0, 1).reshape(key_heads, -1, size)  # (K, B · R · L, d)
        to_prefix = PartialAttention(together, self.keys[layer], self.values[layer], None, scaling)
        bias = own_bias.expand(-1, heads, -1, -1).reshape(b * key_heads, -1, key.shape[2])
        to_own = PartialAttention(*(x.flatten(0, 1) for x in (q, key, value)), bias, scaling)
        of_prefix = (x.unflatten(1, (b, -1)).transpose(0, 1).flatten(0, 1) for x in to_prefix.run())
        out, _ = joined(*to_own.run(), *of_prefix)
        return out.reshape(b, heads, length, -1).transpose(1, 2)
