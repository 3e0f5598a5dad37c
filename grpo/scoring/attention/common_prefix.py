"""Attention, while decoding, to the tokens that all prompts begin with; their keys and values are held once.

With worked examples, most tokens of each prompt are the same. Were their keys and values copied for each row, reading
them would take as long as reading the weights of a small model. Held once, all rows read them in one product of
matrices. Attention to the prefix and to the rest of a row is joined exactly, as in Hydragen (arXiv:2402.05099).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grpo.scoring.attention.layout import as_bias
from grpo.scoring.attention.partial import PartialAttention, joined


@dataclass(frozen=True)
class CommonPrefix:
    """Keys and values of the S tokens that all rows begin with, at positions 0 to S - 1: (K, S, d) for each layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        """Return S."""
        return self.keys[0].shape[1]

    def arguments(self, seen: Tensor) -> dict[str, Any]:
        """Return a model's arguments for rows that see these tokens after the prefix, (B, L, T) bool.

        The model takes the mask for a finished one and passes it on to `attend` as `bias`.
        """
        return {"attention_mask": as_bias(seen, self.keys[0].dtype)[:, None], "common_prefix": self}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """Attend to the prefix and to the rest of each row: query (B, H, L, d), key and value (B, K, T, d).

        `bias` (B, 1, L, T) is added to the scores of the rest. The result is (B, L, H, d).
        """
        (b, heads, length, size), key_heads = query.shape, key.shape[1]
        q = query.reshape(b, key_heads, -1, size)  # the R heads of a key as rows of one matrix
        all_rows = q.transpose(0, 1).reshape(key_heads, -1, size)  # (K, B · R · L, d)
        to_prefix = PartialAttention(all_rows, self.keys[layer], self.values[layer], None, scaling)
        bias = bias.expand(-1, heads, -1, -1).reshape(b * key_heads, -1, key.shape[2])
        to_rest = PartialAttention(q.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias, scaling)
        by_row = [x.unflatten(1, (b, -1)).transpose(0, 1).flatten(0, 1) for x in to_prefix.run()]
        out, _ = joined(*to_rest.run(), *by_row)
        return out.reshape(b, heads, length, -1).transpose(1, 2)
