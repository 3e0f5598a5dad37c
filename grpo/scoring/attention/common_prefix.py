"""Decode with one copy of the keys and values of the tokens that all prompts begin with.

With worked examples, most tokens of each prompt are the same. If their keys and values were copied for each row,
reading the copies would take as long as reading the weights of a small model. Here they are held once, and one matrix
product reads them for all rows. Joining the attention to the prefix with the attention to the rest of a row is exact,
as in Hydragen (arXiv:2402.05099).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grpo.scoring.attention.layout import as_bias
from grpo.scoring.attention.partial import PartialAttention, joined


@dataclass(frozen=True)
class CommonPrefix:
    """For each layer, the keys and values (K, S, d) of the S tokens that all rows begin with; K key heads."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """Return S."""
        return self.keys[0].shape[1]

    def arguments(self, seen: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of a forward pass over rows that begin with the prefix.

        `seen` (B, L, T) bool tells which tokens after the prefix each of L new tokens sees. A mask of four dimensions
        is passed on by the model unchanged, so `attend` gets it as `bias`.
        """
        return {"attention_mask": as_bias(seen, self.keys[0].dtype)[:, None], "common_prefix": self}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """Return the attention, (B, L, H, d), of each row to the prefix and to the row's own tokens.

        `query` is (B, H, L, d). `key` and `value` (B, K, T, d) belong to the tokens after the prefix, and `bias`
        (B, 1, L, T) is added to their scores.
        """
        (b, heads, length, size), key_heads = query.shape, key.shape[1]
        q = query.reshape(b, key_heads, -1, size)  # the R query heads of a key head are rows of one matrix
        all_rows = q.transpose(0, 1).reshape(key_heads, -1, size)  # (K, B · R · L, d)
        to_prefix = PartialAttention(all_rows, self.keys[layer], self.values[layer], None, scaling)
        bias = bias.expand(-1, heads, -1, -1).reshape(b * key_heads, -1, key.shape[2])
        to_rest = PartialAttention(q.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias, scaling)
        by_row = [x.unflatten(1, (b, -1)).transpose(0, 1).flatten(0, 1) for x in to_prefix.run()]
        out, _ = joined(*to_rest.run(), *by_row)
        return out.reshape(b, heads, length, -1).transpose(1, 2)
