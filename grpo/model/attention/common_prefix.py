"""Attention in decoding to what all prompts begin with, held once for all rows.

With worked examples, most of each prompt is the same. Copied for each row, its keys and values are as much to read a
token as the weights of a small model; held once, all rows read the same ones, as one product of matrices. Prefix and
own part are joined by one softmax over both, so this is exact (the idea is Hydragen's, arXiv:2402.05099).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        bias = torch.zeros(seen.shape, dtype=self.keys[0].dtype, device=seen.device)
        return bias.masked_fill_(~seen, -torch.inf)[:, None]

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
