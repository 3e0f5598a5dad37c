"""Attention over a packed row: the real tokens of N prompts and of their B = N · G completions, without padding.

The model is run once on one row of T tokens, so its linear layers see every prompt token once and no padding; what
all prompts begin with, such as worked examples, they see once for all. Only attention has to know which tokens belong
together: `packed_attention`, registered with transformers as "shared_prefix", splits queries, keys and values by a
`Layout`, lets prompts attend to themselves and completions to their prompt and themselves, and joins the results
again. All own tokens attend to a common beginning in one product of matrices. Without a layout it is transformers'
own attention ("sdpa"), so a model can keep it while it samples.

What did not pay, on one thread at the default sizes: a single autograd function for the whole attention, with a
backward pass by hand, takes 4% off an update; torch's fused attention adds 13% there, and is as fast as scores in
memory at 16 completions of 64 on prompts of 150.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo.scoring.attention.common_prefix import CommonPrefix
from grpo.scoring.attention.layout import IndexMaps, Layout, causal
from grpo.scoring.attention.tree import Tree

NAME = "shared_prefix"
SCORES = 2**21  # attention scores of a layer that may be held in memory, 8 MiB
# arguments of attention that change nothing in it
WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache"}
Vectors = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
LAYERS = {"full_attention", "sliding_attention"}


class _Unpack(torch.autograd.Function):
    """Split the vectors of a row (1, H, T, d) into those of prompts (N · H · P, d) and completions (B · H · C, d).

    Padding gets the vectors of some token; nothing attends to it. The gradient is gathered too: that of indexing
    would be a slow sum in no fixed order.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, row: Tensor, maps: IndexMaps) -> tuple[Tensor, Tensor]:
        """Return prompts and completions."""
        ctx.shape, ctx.maps = row.shape, maps
        vectors = row[0].transpose(0, 1).reshape(-1, row.shape[-1])
        return maps.split(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor) -> tuple[Tensor, None]:
        """Join their gradients to that of the row."""
        _, heads, length, size = ctx.shape
        row = ctx.maps.join(prompts, completions)
        return row.view(1, length, heads, size).transpose(1, 2), None


class _Pack(torch.autograd.Function):
    """Join prompts (N · H · P, d) and completions (B · H · C, d) to a row (T · H, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor, maps: IndexMaps) -> Tensor:
        """Return the row."""
        ctx.maps = maps
        return maps.join(prompts, completions)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, row: Tensor) -> tuple[Tensor, Tensor, None]:
        """Split the gradient of the row; it is 0 on padding, whose results are not used."""
        return *ctx.maps.split(row, padding=0), None


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
    """Attend over a packed row: query (1, H, T, d), key and value (1, K, T, d) to (1, T, H, d).

    The arguments are those of transformers' attention functions, and `layout`; or `common_prefix`, in decoding, where
    `attention_mask` is added to the scores of each row's own keys. Raises ValueError if the model asks for something
    this attention does not have, such as a softcap.
    """
    if layout is None and common_prefix is None:
        more |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    unknown = {name for name, asked in more.items() if asked is not None and asked is not False} - WITHOUT_EFFECT
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise ValueError(f"no shared prefix with {', '.join(sorted(unknown)) or 'such attention'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if common_prefix is not None:
        return common_prefix.attend(module.layer_idx, query, key, value, attention_mask, scaling), None
    row = query, key, value
    if layout.common_prefix:
        return _attend_tree(module, row, layout, scaling, sliding_window), None
    return _attend_own(module, row, layout, scaling, sliding_window), None


def _attend_tree(module: nn.Module, row: Vectors, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Attend over a row that has a common beginning: that to itself, all others to it and to their own tokens."""
    common = layout.common_prefix
    first, own = zip(*(x.split([common, x.shape[2] - common], 2) for x in row), strict=True)
    mask = None if window is None else causal(torch.arange(common, device=row[0].device), window)
    beginning = _torch_attend(module, *first, mask, scaling)  # (1, H, S, d)
    out = Tree(layout, scaling, window).attend(*(x[0] for x in (*own, *first[1:])))
    return torch.cat([beginning.transpose(1, 2), out[None]], 1)


def _attend_own(module: nn.Module, row: Vectors, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Attend to the tokens of one's own prompt and completion: (1, T, H, d)."""
    (_, heads, length, _), key_heads = row[0].shape, row[1].shape[1]
    maps, key_maps = layout.maps(heads), layout.maps(key_heads)
    (n, p), (b, c) = layout.prompt_index.shape, layout.completion_index.shape
    split = [_Unpack.apply(x, of) for x, of in zip(row, (maps, key_maps, key_maps), strict=True)]
    q, k, v = (x.view(n, -1, p, x.shape[-1]) for x, _ in split)
    own_q, own_k, own_v = (x.view(b, -1, c, x.shape[-1]) for _, x in split)
    all_k, all_v = _after_prompts(k, own_k), _after_prompts(v, own_v)
    if q.device.type == "cpu" and (n * p * p + b * c * (p + c)) * heads <= SCORES:
        bias, own_bias = layout.biases(window, heads, key_heads, q.dtype)
        prompts = _attend(q, k, v, bias, scaling)
        completions = _attend(own_q, all_k, all_v, own_bias, scaling)
    else:
        mask, own_mask = layout.masks(window)
        mask = None if window is None else mask  # causal attention has faster kernels
        prompts = _torch_attend(module, q, k, v, mask, scaling)
        completions = _torch_attend(module, own_q, all_k, all_v, own_mask, scaling)
    out = _Pack.apply(prompts.reshape(-1, v.shape[-1]), completions.reshape(-1, v.shape[-1]), maps)
    return out.view(1, length, heads, -1)


def _after_prompts(of_prompts: Tensor, own: Tensor) -> Tensor:
    """Join keys or values of prompts (N, K, P, d) and completions (B, K, C, d) to (B, K, P + C, d)."""
    n, b = len(of_prompts), len(own)
    of_prompts = of_prompts[:, None].expand(-1, b // n, -1, -1, -1)
    return torch.cat([of_prompts, own.unflatten(0, (n, -1))], 3).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attend with scores in memory: q (M, H, L, d), k and v (M, K, S, d), bias (M · K or 1, R · L, S).

    On a CPU this is faster than torch's fused attention for small tensors.
    """
    q, k, v = _by_key(q, k, v, bias)
    weights = torch.baddbmm(bias, q * scaling, k.transpose(1, 2)).softmax(-1)
    return weights @ v


def _by_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Vectors:
    """Return queries (M · K, R · L, d), the R heads of a key as rows of one matrix, keys and values (M · K, S, d)."""
    return q.reshape(-1, bias.shape[1], q.shape[-1]), k.flatten(0, 1), v.flatten(0, 1)


def _torch_attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attend by torch's fused attention, called through transformers, which knows what each device supports."""
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)  # (M, L, H, d)
    return out.transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model: PreTrainedModel) -> None:
    """Make a model use `packed_attention`. Raises ValueError if its own attention is not "sdpa"."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"no shared prefix with {model.config._attn_implementation} attention")
    # other layers (chunks, convolutions, state spaces) mix tokens by rules that a packed row does not follow
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if kinds:
        raise ValueError(f"no shared prefix with layers of {', '.join(sorted(kinds))}")


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
