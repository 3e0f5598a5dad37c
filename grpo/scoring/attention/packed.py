"""Attention over a packed row: the real tokens of N prompts and of their B = N · G completions, without padding.

The linear layers of a model see each token of the row once. Only attention has to know which tokens belong together:
`packed_attention`, registered with transformers as "shared_prefix", splits the row by its `Layout`, lets prompts
attend to themselves and completions to their prompt and themselves, and joins the results. For a row with a common
beginning, `tree.py` does this. Without a layout, `packed_attention` calls transformers' own attention ("sdpa"), so it
need not be disabled for sampling.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo.runtime.shortcuts import UnsupportedError
from grpo.scoring.attention.common_prefix import CommonPrefix
from grpo.scoring.attention.layout import IndexMaps, Layout, causal
from grpo.scoring.attention.tree import Tree, TreeAttention

NAME = "shared_prefix"
SCORES = 2**21  # At most this many attention scores of a layer are held in memory: 8 MiB in float32.
IGNORED_ARGUMENTS = {"position_ids", "cache_position", "use_cache"}  # attention does not depend on these
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
Vectors = tuple[Tensor, Tensor, Tensor]  # queries, keys and values


class _Split(torch.autograd.Function):
    """Split the vectors of a packed row (T · H, d) into prompts (N · H · P, d) and completions (B · H · C, d).

    Padding may get arbitrary vectors, because no token attends to it. The backward pass gathers the gradient by index
    too, because autograd's backward pass of indexing would sum it slowly and in a varying order.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, row: Tensor, maps: IndexMaps) -> tuple[Tensor, Tensor]:
        ctx.maps = maps
        return maps.split(row)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_prompts: Tensor, grad_completions: Tensor) -> tuple[Tensor, None]:
        return ctx.maps.join(grad_prompts, grad_completions), None


class _Join(torch.autograd.Function):
    """Join the vectors of prompts (N · H · P, d) and completions (B · H · C, d) into one packed row (T · H, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor, maps: IndexMaps) -> Tensor:
        ctx.maps = maps
        return maps.join(prompts, completions)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_row: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.maps.split(grad_row, padding=0), None  # padding is not part of the row, so its gradient is 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    common_prefix: CommonPrefix | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return the attention (1, T, H, d) over a packed row: query (1, H, T, d), key and value (1, K, T, d).

    The model passes on `layout` when a packed row is scored. When rows are decoded after a common prefix, it passes
    on `common_prefix`, and `attention_mask` is added to the scores of the tokens after the prefix. Raises
    UnsupportedError if the model asks for something that this attention does not support, such as a softcap.
    """
    if layout is None and common_prefix is None:
        more |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    given = {name for name, argument in more.items() if argument is not None and argument is not False}
    unknown = sorted(given - IGNORED_ARGUMENTS)
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise UnsupportedError(f"packed rows do not work with {', '.join(unknown) or 'this kind of attention'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if common_prefix is not None:
        return common_prefix.attend(module.layer_idx, query, key, value, attention_mask, scaling), None
    attend = _attend_tree if layout.common_prefix else _attend_branches
    return attend(module, (query, key, value), layout, scaling, sliding_window), None


def _attend_tree(module: nn.Module, row: Vectors, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Return the attention (1, T, H, d) over a row with a common beginning."""
    common = layout.common_prefix
    beginning = [x[:, :, :common] for x in row]
    mask = None if window is None else causal(torch.arange(common, device=row[0].device), window)
    beginning_out = _torch_attend(module, *beginning, mask, scaling)  # (1, H, S, d)
    rest = [x[0, :, common:] for x in row]
    rest_out = TreeAttention.apply(Tree(layout, scaling, window), *rest, beginning[1][0], beginning[2][0])
    return torch.cat([beginning_out.transpose(1, 2), rest_out[None]], 1)


def _attend_branches(module: nn.Module, row: Vectors, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Return the attention (1, T, H, d) over a row without a common beginning."""
    heads, key_heads = row[0].shape[1], row[1].shape[1]
    (n, p), (b, c) = layout.prompt_index.shape, layout.completion_index.shape
    split = [_Split.apply(x[0].transpose(0, 1).reshape(-1, x.shape[-1]), layout.maps(x.shape[1])) for x in row]
    prompts = [x.view(-1, p, x.shape[-1]) for x, _ in split]
    q, k, v = (x.view(-1, c, x.shape[-1]) for _, x in split)
    completions = q, layout.after_prompts(prompts[1], k), layout.after_prompts(prompts[2], v)
    if q.device.type == "cpu" and (n * p * p + b * c * (p + c)) * heads <= SCORES:
        prompt_bias, completion_bias = layout.biases(window, heads, key_heads, q.dtype)
        prompt_out = _attend(*prompts, prompt_bias, scaling)
        completion_out = _attend(*completions, completion_bias, scaling)
    else:
        prompt_mask, completion_mask = layout.masks(window)
        prompt_mask = None if window is None else prompt_mask  # causal attention has faster kernels
        prompt_out = _torch_attend(module, *(x.unflatten(0, (n, -1)) for x in prompts), prompt_mask, scaling)
        completion_out = _torch_attend(
            module, *(x.unflatten(0, (b, -1)) for x in completions), completion_mask, scaling
        )
    size = v.shape[-1]
    out = _Join.apply(prompt_out.reshape(-1, size), completion_out.reshape(-1, size), layout.maps(heads))
    return out.view(1, -1, heads, size)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return the attention of q (M · H, L, d) to k and v (M · K, S, d), with all scores in memory.

    `bias` is (M · K or 1, R · L, S). For small tensors on a CPU this is faster than torch's fused attention.
    """
    q = q.reshape(-1, bias.shape[1], q.shape[-1])  # (M · K, R · L, d): the R query heads of a key head
    weights = torch.baddbmm(bias, q * scaling, k.transpose(1, 2)).softmax(-1)
    return weights @ v


def _torch_attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return torch's fused attention, (M, H, L, d), called through transformers, which knows each device's limits."""
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)  # (M, L, H, d)
    return out.transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model: PreTrainedModel) -> None:
    """Make a model use `packed_attention`. Raises UnsupportedError if its attention or layers are not supported."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    if not is_enabled(model):
        raise UnsupportedError(f"packed rows do not work with {model.config._attn_implementation} attention")
    # Other layers (chunks, convolutions, state spaces) mix tokens by rules that a packed row does not follow.
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - SUPPORTED_LAYERS
    if kinds:
        raise UnsupportedError(f"packed rows do not work with layers of type {', '.join(sorted(kinds))}")


def is_enabled(model: PreTrainedModel) -> bool:
    """Return whether a model uses `packed_attention`."""
    return model.config._attn_implementation == NAME


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`: make a model use the attention of transformers ("sdpa") again."""
    if is_enabled(model):
        model.set_attn_implementation("sdpa")
