"""Attention over a packed row: the real tokens of N prompts and of their B = N · G completions, and no padding.

A model is run once on one row of T tokens, so its linear layers see every prompt token once and no padding.
Attention alone has to know whose tokens are whose: `shared_prefix`, registered with transformers under that name,
takes queries, keys and values apart by a `Layout`, lets prompts attend to themselves and completions to their prompt
and themselves, and puts the results back into the row. Without a layout it is transformers' own attention ("sdpa"),
so that a model can keep it while it samples.

What did not pay, on one thread at the default sizes: one autograd function for all of an attention, with its backward
pass by hand, takes 4% off an update; torch's fused attention adds 13% there, and is as fast as scores in memory at 16
completions of 64 on prompts of 150.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "shared_prefix"
SCORES = 2**21  # attention scores of a layer that may stand in memory, 8 MiB of them
# what models hand on to attention that changes nothing in it
WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache"}
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Places:
    """Where vectors stand: a row of T tokens has T · H, those of a token side by side. All are (…,) int64."""

    prompts: Tensor  # (N · H · P,) the place in the row of each vector of the prompts; anywhere for padding
    completions: Tensor  # (B · H · C,) the same of the completions
    from_prompts: Tensor  # where in the former the vectors of the row's prompt tokens stand
    from_completions: Tensor  # where in the latter those of its completion tokens stand
    prompt_padding: Tensor  # what is padding in the first
    completion_padding: Tensor  # what is padding in the second


@dataclass(frozen=True)
class Layout:
    """Which token of a packed row is whose: the prompts' tokens but the last of each, these, then the completions'.

    Taken apart, prompts (N, P) and completions (B, C) are padded on the right. A prompt's last token stands by the
    completions because what it predicts is wanted too: so the tokens whose logits are read come at the end.
    """

    prompt_lengths: Tensor  # (N,) int64, from 1
    completion_lengths: Tensor  # (B,) int64, from 0
    prompt_places: Tensor  # (N, P) int64, in the row; anywhere for padding
    completion_places: Tensor  # (B, C) int64, in the row; anywhere for padding
    _of_layers: dict[Any, Any] = field(default_factory=dict, repr=False)  # what a layer makes and others use again

    @classmethod
    def of(cls, prompt_lengths: Tensor, completion_lengths: Tensor) -> "Layout":
        """The layout for prompts (N,) and completions (B,), group-major, of these lengths."""
        p, c = prompt_lengths[:, None], completion_lengths[:, None]
        i = torch.arange(int(p.max()), device=p.device)
        j = torch.arange(max(1, int(c.max())), device=p.device)  # a column of padding where no completion has any
        last = (p - 1).sum() + torch.arange(len(p), device=p.device)[:, None]
        prompts = torch.where(i < p - 1, (p - 1).cumsum(0) - (p - 1) + i, last)
        completions = torch.where(j < c, p.sum() + c.cumsum(0) - c + j, 0)
        return cls(prompt_lengths, completion_lengths, prompts, completions)

    def places(self, heads: int) -> Places:
        """The places of the vectors of this many heads."""
        if ("places", heads) not in self._of_layers:
            prompts = _places(self.prompt_places, self.prompt_lengths, heads)
            completions = _places(self.completion_places, self.completion_lengths, heads)
            pairs = zip(prompts, completions, strict=True)
            self._of_layers["places", heads] = Places(*(places for pair in pairs for places in pair))
        return self._of_layers["places", heads]

    def masks(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What may be attended to: (1, 1, P, P) by prompts, (B, 1, C, P + C) by completions; bool.

        Padding comes after all that is real, so only the prompts' has to be kept from the completions.
        """
        if ("masks", window) not in self._of_layers:
            lengths = self.prompt_lengths.repeat_interleave(self.num_generations)[:, None, None]  # (B, 1, 1)
            i = torch.arange(self.prompt_places.shape[1], device=lengths.device)
            j = torch.arange(self.completion_places.shape[1], device=lengths.device)
            reach = torch.inf if window is None else window
            to_prompt = (i < lengths) & (lengths + j[:, None] - i < reach)  # (B, C, P)
            to_itself = _causal(j, reach).expand(len(lengths), -1, -1)
            masks = _causal(i, reach)[None, None], torch.cat([to_prompt, to_itself], -1)[:, None]
            self._of_layers["masks", window] = masks
        return self._of_layers["masks", window]

    def biases(self, window: int | None, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The masks as numbers to add to scores, 0 or -inf: (1, R · P, P) and (B · K, R · C, P + C), R = H / K."""
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


def _places(of_tokens: Tensor, lengths: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """For tokens (M, L): the place of each of the (M, H, L) vectors, where the real ones stand in the order of these
    places, and which are padding."""
    head = torch.arange(heads, device=of_tokens.device)[:, None]
    places = (of_tokens[:, None] * heads + head).flatten()
    real = torch.arange(of_tokens.shape[1], device=of_tokens.device) < lengths[:, None]
    real = real[:, None].expand(-1, heads, -1).flatten()
    own = real.nonzero().squeeze(-1)
    return places, own[places[own].argsort()], (~real).nonzero().squeeze(-1)


class _Unpack(torch.autograd.Function):
    """The vectors of a row (1, H, T, d) as those of prompts (N · H · P, d) and completions (B · H · C, d).

    On padding stand those of some token, and nobody attends to them. The gradient is gathered as well, which
    indexing would leave to a slow sum in no fixed order.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, row: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Prompts and completions, apart."""
        ctx.shape, ctx.places = row.shape, places
        vectors = row[0].transpose(0, 1).reshape(-1, row.shape[-1])
        return vectors.index_select(0, places.prompts), vectors.index_select(0, places.completions)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor) -> tuple[Tensor, None]:
        """Their gradients as the row's."""
        _, heads, length, size = ctx.shape
        return _row(prompts, completions, ctx.places).view(1, length, heads, size).transpose(1, 2), None


class _Pack(torch.autograd.Function):
    """The way back: prompts (N · H · P, d) and completions (B · H · C, d) as a row (T · H, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, prompts: Tensor, completions: Tensor, places: Places) -> Tensor:
        """The row of both."""
        ctx.places = places
        return _row(prompts, completions, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, row: Tensor) -> tuple[Tensor, Tensor, None]:
        """The row's gradient as theirs: 0 on padding, whose results are nobody's."""
        places = ctx.places
        prompts = row.index_select(0, places.prompts).index_fill_(0, places.prompt_padding, 0)
        completions = row.index_select(0, places.completions).index_fill_(0, places.completion_padding, 0)
        return prompts, completions, None


def _row(prompts: Tensor, completions: Tensor, places: Places) -> Tensor:
    split = len(places.from_prompts)
    row = prompts.new_empty(split + len(places.from_completions), prompts.shape[-1])
    torch.index_select(prompts, 0, places.from_prompts, out=row[:split])
    torch.index_select(completions, 0, places.from_completions, out=row[split:])
    return row


def shared_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row: query (1, H, T, d), key and value (1, K, T, d) to (1, T, H, d).

    Raises ValueError where the model asks for what this attention has not, a softcap for instance.
    """
    if layout is None:
        more |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    unknown = {name for name, asked in more.items() if asked is not None and asked is not False} - WITHOUT_EFFECT
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise ValueError(f"no shared prefix with {', '.join(sorted(unknown)) or 'such attention'}")
    (_, heads, length, size), key_heads = query.shape, key.shape[1]
    places, key_places = layout.places(heads), layout.places(key_heads)
    (n, p), (b, c) = layout.prompt_places.shape, layout.completion_places.shape
    of_prompts, of_completions = zip(
        _Unpack.apply(query, places), _Unpack.apply(key, key_places), _Unpack.apply(value, key_places), strict=True
    )
    q, k, v = (x.view(n, -1, p, x.shape[-1]) for x in of_prompts)
    own_q, own_k, own_v = (x.view(b, -1, c, x.shape[-1]) for x in of_completions)
    scaling = size**-0.5 if scaling is None else scaling
    all_k, all_v = (_after_prompts(x, own) for x, own in ((k, own_k), (v, own_v)))
    if query.device.type == "cpu" and (n * p * p + b * c * (p + c)) * heads <= SCORES:
        bias, own_bias = layout.biases(sliding_window, heads, key_heads, query.dtype)
        prompts = _attend(q, k, v, bias, scaling)
        completions = _attend(own_q, all_k, all_v, own_bias, scaling)
    else:
        mask, own_mask = layout.masks(sliding_window)
        mask = None if sliding_window is None else mask  # causal attention has kernels of its own
        prompts = _torch_attend(module, q, k, v, mask, scaling)
        completions = _torch_attend(module, own_q, all_k, all_v, own_mask, scaling)
    row = _Pack.apply(prompts.reshape(-1, value.shape[-1]), completions.reshape(-1, value.shape[-1]), places)
    return row.view(1, length, heads, -1), None


def _after_prompts(of_prompts: Tensor, own: Tensor) -> Tensor:
    """Keys or values of prompts (N, K, P, d) and completions (B, K, C, d) for each completion, (B, K, P + C, d)."""
    n, b = len(of_prompts), len(own)
    of_prompts = of_prompts[:, None].expand(-1, b // n, -1, -1, -1)
    return torch.cat([of_prompts, own.unflatten(0, (n, -1))], 3).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attention with scores in memory: q (M, H, L, d), k and v (M, K, S, d), bias (M · K or 1, R · L, S).

    On a CPU faster than torch's fused one where the tensors are small. The R heads of a key are rows of one matrix.
    """
    q = q.reshape(-1, bias.shape[1], q.shape[-1]) * scaling
    weights = torch.baddbmm(bias, q, k.flatten(0, 1).transpose(1, 2)).softmax(-1)
    return weights @ v.flatten(0, 1)


def _torch_attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same by torch's fused attention, called as transformers does, which knows what devices can."""
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)  # (M, L, H, d)
    return out.transpose(1, 2)


AttentionInterface.register(NAME, shared_prefix)
AttentionMaskInterface.register(NAME, sdpa_mask)


def engage(model: PreTrainedModel) -> None:
    """Have a model attend by `shared_prefix`; ValueError where it does not attend by "sdpa" of its own accord."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"no shared prefix with {model.config._attn_implementation} attention")
    # others (chunks, convolutions, state spaces) mix tokens by rules that the packed row does not know
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if kinds:
        raise ValueError(f"no shared prefix with layers of {', '.join(sorted(kinds))}")


def disengage(model: PreTrainedModel) -> None:
    """Have it attend as it did before."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
