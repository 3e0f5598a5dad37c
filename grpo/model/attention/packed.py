"""Attention over a packed row: the real tokens of N prompts and of their B = N · G completions, without padding.

The model is run once on one row of T tokens, so its linear layers see every prompt token once and no padding; what
all prompts begin with, such as worked examples, they see once for all. Only attention has to know which tokens belong
together: `packed_attention`, registered with transformers as "shared_prefix", splits queries, keys and values by a
`Layout`, lets prompts attend to themselves and completions to their prompt and themselves, and joins the results
again. Without a layout it is transformers' own attention ("sdpa"), so a model can keep it while it samples.

What did not pay, on one thread at the default sizes: a single autograd function for the whole attention, with a
backward pass by hand, takes 4% off an update; torch's fused attention adds 13% there, and is as fast as scores in
memory at 16 completions of 64 on prompts of 150.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grpo.model.prefix_attention import CommonPrefix

NAME = "shared_prefix"
SCORES = 2**21  # attention scores of a layer that may be held in memory, 8 MiB
# arguments of attention that change nothing in it
WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache"}
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class IndexMaps:
    """Indices between a row of T · H vectors, those of a token side by side, and its split form. All (…,) int64."""

    prompts: Tensor  # (N · H · P,) index in the row of each vector of the prompts; any index for padding
    completions: Tensor  # (B · H · C,) index in the row of each vector of the completions
    from_prompts: Tensor  # indices in `prompts` of the real vectors, in the order of the row, each once
    from_completions: Tensor  # indices in `completions` of the real vectors, in the order of the row
    prompt_padding: Tensor  # indices in `prompts` of all others: padding, and copies of the common beginning
    completion_padding: Tensor  # indices of padding in `completions`
    copies: Tensor  # (N - 1, S · H) indices in `prompts` of those copies, each in the order of the row


@dataclass(frozen=True)
class Layout:
    """The order of a packed row: the S tokens that all prompts begin with, their other tokens but the last of each,
    those, then the completion tokens.

    In the split form, prompts (N, P) and completions (B, C) are padded on the right, and each prompt has a copy of
    the common beginning. The last token of a prompt comes with the completions because its logits are needed too: so
    the tokens whose logits are read are at the end.
    """

    prompt_lengths: Tensor  # (N,) int64, from 1
    completion_lengths: Tensor  # (B,) int64, from 0
    prompt_index: Tensor  # (N, P) int64, index in the row; any index for padding
    completion_index: Tensor  # (B, C) int64, index in the row; any index for padding
    common_prefix: int = 0  # S, at most all but the last token of each prompt
    # computed by one layer, reused by the others
    _of_layers: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, prompt_lengths: Tensor, completion_lengths: Tensor, common_prefix: int = 0) -> "Layout":
        """Make the layout of prompts (N,) and completions (B,), group-major, of these lengths."""
        p, c, s = prompt_lengths[:, None], completion_lengths[:, None], common_prefix
        i = torch.arange(int(p.max()), device=p.device)
        j = torch.arange(max(1, int(c.max())), device=p.device)  # a column of padding where no completion has any
        own = p - 1 - s  # tokens between the common beginning and the last
        last = s + own.sum() + torch.arange(len(p), device=p.device)[:, None]
        prompts = torch.where(i < p - 1, own.cumsum(0) - own + i, last)
        prompts = torch.where(i < s, i, prompts)
        completions = torch.where(j < c, last[-1] + 1 + c.cumsum(0) - c + j, 0)
        return cls(prompt_lengths, completion_lengths, prompts, completions, s)

    def maps(self, heads: int) -> IndexMaps:
        """Return the indices of the vectors of `heads` heads."""
        if ("maps", heads) not in self._of_layers:
            prompts = _index_maps(self.prompt_index, self.prompt_lengths, heads, self.common_prefix)
            completions = _index_maps(self.completion_index, self.completion_lengths, heads)
            pairs = zip(prompts, completions, strict=True)
            copies = torch.arange(len(prompts[0]), device=self.prompt_index.device)
            copies = copies.view(len(self.prompt_lengths), heads, -1)[1:, :, : self.common_prefix]
            self._of_layers["maps", heads] = IndexMaps(
                *(maps for pair in pairs for maps in pair), copies.transpose(1, 2).flatten(1)
            )
        return self._of_layers["maps", heads]

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the attention masks of prompts (1, 1, P, P) and of completions (B, 1, C, P + C), bool.

        Padding follows all real tokens, so only that of the prompts has to be hidden, from the completions.
        """
        if ("masks", window) not in self._of_layers:
            lengths = self.prompt_lengths.repeat_interleave(self.num_generations)[:, None, None]  # (B, 1, 1)
            i = torch.arange(self.prompt_index.shape[1], device=lengths.device)
            j = torch.arange(self.completion_index.shape[1], device=lengths.device)
            reach = torch.inf if window is None else window
            to_prompt = (i < lengths) & (lengths + j[:, None] - i < reach)  # (B, C, P)
            to_itself = _causal(j, reach).expand(len(lengths), -1, -1)
            masks = _causal(i, reach)[None, None], torch.cat([to_prompt, to_itself], -1)[:, None]
            self._of_layers["masks", window] = masks
        return self._of_layers["masks", window]

    def biases(self, window: int | None, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the masks as addends of scores, 0 or -inf: (1, R · P, P) and (B · K, R · C, P + C), R = H / K."""
        name = ("biases", window, heads, key_heads, dtype)
        if name not in self._of_layers:
            prompts, completions = (
                torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
                for mask in self.masks(window)
            )
            repeats, (rows, _, _, width) = heads // key_heads, completions.shape
            completions = completions.repeat(1, key_heads, repeats, 1).view(rows * key_heads, -1, width)
            self._of_layers[name] = prompts[0].repeat(1, repeats, 1), completions
        return self._of_layers[name]

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completion_lengths) // len(self.prompt_lengths)


def _causal(i: Tensor, reach: float) -> Tensor:
    return (i[:, None] >= i) & (i[:, None] - i < reach)


def _index_maps(index: Tensor, lengths: Tensor, heads: int, common: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return for tokens (M, L) the row index of each of the (M, H, L) vectors, the indices of the real vectors in the
    order of the row, and those of the others: padding, and the `common` first tokens of all rows but the first."""
    head = torch.arange(heads, device=index.device)[:, None]
    maps = (index[:, None] * heads + head).flatten()
    real = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
    real[1:, :common] = False
    real = real[:, None].expand(-1, heads, -1).flatten()
    own = real.nonzero().squeeze(-1)
    return maps, own[maps[own].argsort()], (~real).nonzero().squeeze(-1)


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
        return vectors.index_select(0, maps.prompts), vectors.index_select(0, maps.completions)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor) -> tuple[Tensor, None]:
        """Join their gradients to that of the row; that of the common beginning is the sum over its copies."""
        _, heads, length, size = ctx.shape
        row, copies = _row(prompts, completions, ctx.maps), ctx.maps.copies
        if copies.numel():
            row[: copies.shape[1]] += prompts.index_select(0, copies.flatten()).view(*copies.shape, size).sum(0)
        return row.view(1, length, heads, size).transpose(1, 2), None


class _Pack(torch.autograd.Function):
    """Join prompts (N · H · P, d) and completions (B · H · C, d) to a row (T · H, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor, maps: IndexMaps) -> Tensor:
        """Return the row."""
        ctx.maps = maps
        return _row(prompts, completions, maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, row: Tensor) -> tuple[Tensor, Tensor, None]:
        """Split the gradient of the row; it is 0 on padding, whose results are not used."""
        maps = ctx.maps
        prompts = row.index_select(0, maps.prompts).index_fill_(0, maps.prompt_padding, 0)
        completions = row.index_select(0, maps.completions).index_fill_(0, maps.completion_padding, 0)
        return prompts, completions, None


def _row(prompts: Tensor, completions: Tensor, maps: IndexMaps) -> Tensor:
    split = len(maps.from_prompts)
    row = prompts.new_empty(split + len(maps.from_completions), prompts.shape[-1])
    torch.index_select(prompts, 0, maps.from_prompts, out=row[:split])
    torch.index_select(completions, 0, maps.from_completions, out=row[split:])
    return row


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
    (_, heads, length, size), key_heads = query.shape, key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    if common_prefix is not None:
        return common_prefix.attend(module.layer_idx, query, key, value, attention_mask, scaling), None
    maps, key_maps = layout.maps(heads), layout.maps(key_heads)
    (n, p), (b, c) = layout.prompt_index.shape, layout.completion_index.shape
    of_prompts, of_completions = zip(
        _Unpack.apply(query, maps), _Unpack.apply(key, key_maps), _Unpack.apply(value, key_maps), strict=True
    )
    q, k, v = (x.view(n, -1, p, x.shape[-1]) for x in of_prompts)
    own_q, own_k, own_v = (x.view(b, -1, c, x.shape[-1]) for x in of_completions)
    all_k, all_v = (_after_prompts(x, own) for x, own in ((k, own_k), (v, own_v)))
    if query.device.type == "cpu" and (n * p * p + b * c * (p + c)) * heads <= SCORES:
        bias, own_bias = layout.biases(sliding_window, heads, key_heads, query.dtype)
        prompts = _attend(q, k, v, bias, scaling)
        completions = _attend(own_q, all_k, all_v, own_bias, scaling)
    else:
        mask, own_mask = layout.masks(sliding_window)
        mask = None if sliding_window is None else mask  # causal attention has faster kernels
        prompts = _torch_attend(module, q, k, v, mask, scaling)
        completions = _torch_attend(module, own_q, all_k, all_v, own_mask, scaling)
    row = _Pack.apply(prompts.reshape(-1, value.shape[-1]), completions.reshape(-1, value.shape[-1]), maps)
    return row.view(1, length, heads, -1), None


def _after_prompts(of_prompts: Tensor, own: Tensor) -> Tensor:
    """Join keys or values of prompts (N, K, P, d) and completions (B, K, C, d) to (B, K, P + C, d)."""
    n, b = len(of_prompts), len(own)
    of_prompts = of_prompts[:, None].expand(-1, b // n, -1, -1, -1)
    return torch.cat([of_prompts, own.unflatten(0, (n, -1))], 3).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attend with scores in memory: q (M, H, L, d), k and v (M, K, S, d), bias (M · K or 1, R · L, S).

    On a CPU this is faster than torch's fused attention for small tensors. The R heads of a key are rows of one
    matrix.
    """
    q = q.reshape(-1, bias.shape[1], q.shape[-1]) * scaling
    weights = torch.baddbmm(bias, q, k.flatten(0, 1).transpose(1, 2)).softmax(-1)
    return weights @ v.flatten(0, 1)


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
