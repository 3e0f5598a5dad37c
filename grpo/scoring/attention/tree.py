"""Compute the attention of the tokens after a common beginning.

It has three parts: all tokens attend to the beginning, in one matrix product; prompts attend to themselves;
completions attend to their prompt and themselves. One autograd function joins the three parts exactly (`partial.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.partial import PartialAttention, joined


@dataclass(frozen=True)
class Tree:
    """Attention of T tokens after a common beginning. Queries are (H, T, d), keys and values (K, T, d), R = H / K.

    `first_key` and `first_value` (K, S, d) are the keys and values of the beginning.
    """

    layout: Layout
    scaling: float
    window: int | None

    def parts(
        self, query: Tensor, key: Tensor, value: Tensor, first_key: Tensor, first_value: Tensor
    ) -> tuple[PartialAttention, ...]:
        """Return the three parts of the attention, in the order in which the module's docstring lists them."""
        heads, key_heads = len(query), len(key)
        prompt_query, completion_query = self.split(query.transpose(0, 1), key_heads)
        prompt_key, completion_key = self.split(key.transpose(0, 1), key_heads)
        prompt_value, completion_value = self.split(value.transpose(0, 1), key_heads)
        all_keys = self.layout.after_prompts(prompt_key, completion_key)
        all_values = self.layout.after_prompts(prompt_value, completion_value)
        beginning_bias = self.layout.beginning_bias(self.window, heads // key_heads)
        prompt_bias, completion_bias = self.layout.biases(self.window, heads, key_heads, query.dtype)
        rows = query.reshape(key_heads, -1, query.shape[-1])  # the R query heads of a key head are rows of one matrix
        return (
            PartialAttention(rows, first_key, first_value, beginning_bias, self.scaling),
            PartialAttention(prompt_query, prompt_key, prompt_value, prompt_bias, self.scaling),
            PartialAttention(completion_query, all_keys, all_values, completion_bias, self.scaling),
        )

    def split(self, row: Tensor, key_heads: int, padding: float | None = None) -> tuple[Tensor, Tensor]:
        """Split (T, H, …), a value per token and head, into (N · K, R · P, …) and (B · K, R · C, …)."""
        prompts, completions = self.layout.maps(row.shape[1]).split(row.flatten(0, 1), padding)
        n, b = len(self.layout.prompt_lengths), len(self.layout.completion_lengths)
        return prompts.view(n * key_heads, -1, *row.shape[2:]), completions.view(b * key_heads, -1, *row.shape[2:])

    def join(self, prompts: Tensor, completions: Tensor, heads: int, filler: float = 0) -> Tensor:
        """Undo `split`: join prompts and completions into (T, H, …)."""
        size = prompts.shape[2:]
        row = self.layout.maps(heads).join(prompts.reshape(-1, *size), completions.reshape(-1, *size), filler)
        return row.view(-1, heads, *size)

    def grad_row(self, grad_prompts: Tensor, grad_all: Tensor, key_heads: int) -> Tensor:
        """Return the gradient (K, T, d) of keys or values.

        `grad_prompts` (N · K, P, d) comes from the queries of prompts, `grad_all` (B · K, P + C, d) from the queries
        of completions.
        """
        n, g = len(self.layout.prompt_lengths), self.layout.num_generations
        by_group = grad_all.unflatten(0, (n, g, -1))  # (N, G, K, P + C, d)
        to_prompts, to_completions = by_group.tensor_split([self.layout.prompt_index.shape[1]], 3)
        grad_prompts = grad_prompts + to_prompts.sum(1).flatten(0, 1)
        return self.join(grad_prompts, to_completions, key_heads).transpose(0, 1)


class TreeAttention(torch.autograd.Function):
    """`TreeAttention.apply(tree, query, key, value, first_key, first_value)` returns the attention (T, H, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, tree: Tree, *vectors: Tensor) -> Tensor:
        heads, size = len(vectors[0]), vectors[2].shape[-1]
        beginning, prompts, completions = tree.parts(*vectors)
        out, sums = beginning.run()
        prompt_out, prompt_sums = prompts.run()
        completion_out, completion_sums = completions.run()
        out, sums = joined(
            tree.join(prompt_out, completion_out, heads),
            tree.join(prompt_sums, completion_sums, heads, filler=-torch.inf),
            out.view(heads, -1, size).transpose(0, 1),
            sums.view(heads, -1).transpose(0, 1),
        )
        ctx.tree = tree
        ctx.save_for_backward(*vectors, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *vectors, out, sums = ctx.saved_tensors
        tree, heads, key_heads = ctx.tree, len(vectors[0]), len(vectors[1])
        beginning, prompts, completions = tree.parts(*vectors)
        by_key = [x.transpose(0, 1).reshape(key_heads, -1, *x.shape[2:]) for x in (grad_out, out, sums)]
        split_grad_out = tree.split(grad_out, key_heads, padding=0)
        split_out = tree.split(out, key_heads, padding=0)
        split_sums = tree.split(sums, key_heads, padding=torch.inf)  # exp(scores - inf) is 0: padding has no gradient
        first_query, first_key, first_value = beginning.gradients(*by_key)
        prompt_query, prompt_key, prompt_value = prompts.gradients(split_grad_out[0], split_out[0], split_sums[0])
        all_query, all_key, all_value = completions.gradients(split_grad_out[1], split_out[1], split_sums[1])
        grad_query = tree.join(prompt_query, all_query, heads).transpose(0, 1)
        grad_query = grad_query + first_query.reshape(heads, -1, grad_query.shape[-1])
        grad_key = tree.grad_row(prompt_key, all_key, key_heads)
        grad_value = tree.grad_row(prompt_value, all_value, key_heads)
        return None, grad_query, grad_key, grad_value, first_key, first_value
