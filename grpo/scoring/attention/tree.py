"""Attention of the own tokens of a packed row: to the beginning that all prompts share, and to their own branch.

A tree has three parts: the common beginning, prompts, completions. All own tokens attend to the beginning in one
product of matrices, prompts to themselves, completions to their prompt and themselves. The parts are joined exactly
(`partial.py`), in one autograd function, which holds the vectors of the row, the result and its sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.partial import PartialAttention, joined

Parts = tuple[PartialAttention, PartialAttention, PartialAttention]


@dataclass(frozen=True)
class Tree:
    """How the own tokens of a row attend. Queries are (H, T, d), keys and values (K, T, d), R = H / K."""

    layout: Layout
    scaling: float
    window: int | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, first_key: Tensor, first_value: Tensor) -> Tensor:
        """Return the attention of the own tokens (T, H, d); the first key and value (K, S, d) are the beginning's."""
        return _TreeAttention.apply(self, query, key, value, first_key, first_value)

    def parts(self, query: Tensor, key: Tensor, value: Tensor, first_key: Tensor, first_value: Tensor) -> Parts:
        """Return attention to the beginning, of prompts to themselves, and of completions to both.

        The R heads of a key are rows of one matrix.
        """
        key_heads = len(key)
        beginning = query.reshape(key_heads, -1, query.shape[-1]), first_key, first_value
        biases = (
            self.layout.beginning_bias(self.window, len(query) // key_heads),
            *self.layout.biases(self.window, len(query), key_heads, query.dtype),
        )
        (q, own_q), (k, own_k), (v, own_v) = (self.split(x.transpose(0, 1), key_heads) for x in (query, key, value))
        branches = (q, k, v), (own_q, self._after_prompts(k, own_k), self._after_prompts(v, own_v))
        parts = zip((beginning, *branches), biases, strict=True)
        return tuple(PartialAttention(*vectors, bias, self.scaling) for vectors, bias in parts)

    def split(self, row: Tensor, key_heads: int, padding: float | None = None) -> tuple[Tensor, Tensor]:
        """Split what the tokens of a row have, (T, H, …), into (N · K, R · P, …) and (B · K, R · C, …)."""
        prompts, completions = self.layout.maps(row.shape[1]).split(row.flatten(0, 1), padding)
        n, b = len(self.layout.prompt_lengths), len(self.layout.completion_lengths)
        return prompts.view(n * key_heads, -1, *row.shape[2:]), completions.view(b * key_heads, -1, *row.shape[2:])

    def join(self, prompts: Tensor, completions: Tensor, heads: int, filler: float = 0) -> Tensor:
        """Join what `split` returns to (T, H, …)."""
        size = prompts.shape[2:]
        row = self.layout.maps(heads).join(prompts.reshape(-1, *size), completions.reshape(-1, *size), filler)
        return row.view(-1, heads, *size)

    def _after_prompts(self, prompts: Tensor, own: Tensor) -> Tensor:
        """Join keys or values of prompts (N · K, P, d) and completions (B · K, C, d) to (B · K, P + C, d)."""
        n, g = len(self.layout.prompt_lengths), self.layout.num_generations
        repeated = prompts.unflatten(0, (n, 1, -1)).expand(-1, g, -1, -1, -1)
        return torch.cat([repeated, own.unflatten(0, (n, g, -1))], 3).flatten(0, 2)

    def _before_completions(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Split a gradient (B · K, P + C, d) into those of prompts, summed over their group, and of completions."""
        n, g = len(self.layout.prompt_lengths), self.layout.num_generations
        p = self.layout.prompt_index.shape[1]
        prompts, own = joint.unflatten(0, (n, g, -1)).tensor_split([p], 3)
        return prompts.sum(1).flatten(0, 1), own

    def of_row(self, of_prompts: Tensor, of_completions: Tensor, key_heads: int) -> Tensor:
        """Return the gradient of the row's keys or values (K, T, d) from those of the two branches."""
        prompts, own = self._before_completions(of_completions)
        return self.join(of_prompts + prompts, own, key_heads).transpose(0, 1)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, tree: Tree, query: Tensor, key: Tensor, value: Tensor, *beginning: Tensor
    ) -> Tensor:
        """Return the attention of the own tokens (T, H, d)."""
        heads, size = len(query), value.shape[-1]
        to_beginning, *branches = tree.parts(query, key, value, *beginning)
        out, sums = to_beginning.run()
        own_out, own_sums = zip(*(branch.run() for branch in branches), strict=True)
        out, sums = joined(
            tree.join(*own_out, heads),
            tree.join(*own_sums, heads, filler=-torch.inf),
            out.view(heads, -1, size).transpose(0, 1),
            sums.view(heads, -1).transpose(0, 1),
        )
        ctx.tree = tree
        ctx.save_for_backward(query, key, value, *beginning, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, of_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the vectors."""
        *vectors, out, sums = ctx.saved_tensors
        tree, heads, key_heads = ctx.tree, len(vectors[0]), len(vectors[1])
        joint = [x.transpose(0, 1).reshape(key_heads, -1, *x.shape[2:]) for x in (of_out, out, sums)]
        # padding has no gradient: exp(scores - inf) is 0
        filled = (of_out, 0), (out, 0), (sums, torch.inf)
        split = zip(*(tree.split(x, key_heads, padding) for x, padding in filled), strict=True)
        parts = zip(tree.parts(*vectors), (joint, *split), strict=True)
        beginning, prompts, completions = (part.gradients(*results) for part, results in parts)
        of_query = tree.join(prompts[0], completions[0], heads).transpose(0, 1)
        of_query = of_query + beginning[0].reshape(heads, -1, of_query.shape[-1])
        of_key, of_value = (tree.of_row(prompts[i], completions[i], key_heads) for i in (1, 2))
        return None, of_query, of_key, of_value, *beginning[1:]
