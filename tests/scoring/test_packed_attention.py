"""The layout of a packed row by hand, its attention against a loop over tokens, and what it refuses."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grpo.generation.probe import probe_scorer
from grpo.runtime.device import TRAITS
from grpo.runtime.precision import in_precision, set_precision
from grpo.scoring.attention import packed as module
from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.packed import disable, enable, packed_attention
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of

MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2)  # what transformers' own attention needs
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def a_layout(prompts=(3, 1), completions=(2, 0, 1, 3), common=0) -> Layout:
    """Return the layout of prompts and completions of these lengths, and of a common beginning of `common` tokens."""
    return Layout.of(torch.tensor(prompts), torch.tensor(completions), common, torch.device("cpu"))


def vectors(length: int, heads: int, seed: int) -> torch.Tensor:
    """Return random queries, keys or values of a row, float64, which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, length, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)


def by_loop(query, key, value, layout, window):
    """Compute the attention of a packed row one token at a time: (1, T, H, d)."""
    out = torch.zeros(query.shape[2], HEADS, SIZE, dtype=query.dtype)
    own = layout.completion_index.tolist()
    for row, c in enumerate(layout.completion_lengths.tolist()):
        group = row // layout.num_generations
        p = int(layout.prompt_lengths[group])
        s = layout.common_prefix
        seen = [*range(s), *(s + i for i in layout.prompt_index[group, :p].tolist() + own[row][:c])]
        for last, token in enumerate(seen):
            keys = seen[max(0, last + 1 - window) : last + 1]
            for head in range(HEADS):
                k, v = (x[0, head // (HEADS // KEY_HEADS), keys] for x in (key, value))
                weights = (k @ query[0, head, token] / SIZE**0.5).softmax(0)
                out[token, head] = weights @ v
    return out[None]


def test_a_layout_by_hand():
    # prompts abc and d, completions of 2, 0, 1 and 3 inputs: the row is a b | c d | A A C D D D
    layout = a_layout()
    assert layout.prompt_index[0].tolist() == [0, 1, 2]
    assert layout.prompt_index[1, 0] == 3
    assert layout.completion_index[0, :2].tolist() == [4, 5]
    assert layout.completion_index[2, 0] == 6
    assert layout.completion_index[3].tolist() == [7, 8, 9]
    assert layout.num_generations == 2
    prompts, completions = layout.masks(None)
    assert prompts[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    # a completion of the second prompt sees the one real token of the prompt, and its own tokens up to each position
    assert completions[3, 0].int().tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1]]


def test_the_masks_of_a_window_by_hand():
    prompts, completions = a_layout().masks(2)  # each token sees itself and the one before
    assert prompts[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    # after a prompt of 3 its last token is seen by the first input only
    assert completions[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert completions[3, 0].int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_a_layout_with_a_common_beginning_by_hand():
    # prompts xyab and xyc, completions of 1 and 2 inputs: the row is x y | a | b c | A C C
    layout = a_layout((4, 3), (1, 2), common=2)
    assert layout.prompt_lengths.tolist() == [2, 1]  # lengths and indices leave out x y
    assert layout.prompt_index[0, :2].tolist() == [0, 1]
    assert layout.prompt_index[1, 0] == 2
    assert layout.completion_index[0, 0] == 3
    assert layout.completion_index[1, :2].tolist() == [4, 5]
    # rows of 8 columns: those of the first prompt are vectors 0 to 7
    assert layout.prompt_index.shape == layout.completion_index.shape == (2, 8)
    maps = layout.maps(1)
    assert maps.prompts.tolist() == [0, 1, 8]
    assert maps.padding.tolist() == [*range(2, 8), *range(9, 16), *range(17, 24), *range(26, 32)]
    assert layout.beginning_bias(None, 1) is None
    # a window of 3 tokens: a sees x and y, b only y; c as a; A is the fifth token, the first C the fourth
    seen = layout.beginning_bias(3, 1)[0] == 0
    assert seen.int().tolist() == [[1, 1], [0, 1], [1, 1], [0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("scores", [module.SCORES, 0], ids=["in memory", "fused"])
@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize(
    ("prompts", "completions", "common"),
    [
        ((3, 1), (2, 0, 1, 3), 0),
        ((5,), (0, 0), 0),
        ((2, 6, 4), (1, 5, 2, 2, 0, 3), 0),
        ((2, 6, 4), (1, 5, 2, 2, 0, 3), 1),
        ((7, 5), (3, 0), 4),
        ((30, 28), (9, 8), 10),  # with 3 tokens of filler
    ],
)
def test_attention_is_that_of_a_loop_over_tokens_in_value_and_gradient(
    prompts, completions, common, window, scores, monkeypatch
):
    monkeypatch.setattr(module, "SCORES", scores)
    layout = a_layout(prompts, completions, common)
    length = sum(prompts) + sum(completions) - common * (len(prompts) - 1) + layout.filler
    inputs = vectors(length, HEADS, 0), vectors(length, KEY_HEADS, 1), vectors(length, KEY_HEADS, 2)
    out, _ = packed_attention(MODULE, *inputs, None, sliding_window=window, layout=layout)
    expected = by_loop(*inputs, layout, window or length)
    out, expected = (torch.cat([x[:, :common], x[:, common + layout.filler :]], 1) for x in (out, expected))
    torch.testing.assert_close(out, expected)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_layout_attention_is_transformers_own_to_the_bit():
    query, key, value = vectors(5, HEADS, 0), vectors(5, KEY_HEADS, 1), vectors(5, KEY_HEADS, 2)
    ours, _ = packed_attention(MODULE, query, key, value, None, scaling=0.3)
    own, _ = sdpa_attention_forward(MODULE, query, key, value, None, scaling=0.3)
    assert torch.equal(ours, own)
    model, tokens = tiny_model("gemma3"), ragged_tokens()
    before = logprobs_of(model, tokens, 1.0, shared=False)
    enable(model)
    assert torch.equal(before, logprobs_of(model, tokens, 1.0, shared=False))


@pytest.mark.parametrize(
    "asked", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}]
)
def test_packed_attention_refuses_what_it_does_not_have(asked):
    inputs = vectors(10, HEADS, 0), vectors(10, KEY_HEADS, 1), vectors(10, KEY_HEADS, 2)
    with pytest.raises(ValueError, match="packed rows do not work with"):
        packed_attention(MODULE, *inputs, None, layout=a_layout(), **asked)
    none = dict.fromkeys(asked, None)  # models without this feature pass None
    packed_attention(MODULE, *inputs, None, layout=a_layout(), **none)


def test_attention_to_later_tokens_is_refused():
    inputs = vectors(10, HEADS, 0), vectors(10, KEY_HEADS, 1), vectors(10, KEY_HEADS, 2)
    with pytest.raises(ValueError, match="packed rows do not work"):
        packed_attention(SimpleNamespace(is_causal=False), *inputs, None, layout=a_layout())


def test_a_model_with_another_attention_keeps_it():
    model, tokens = tiny_model("llama"), ragged_tokens((9, 12))
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        enable(model)
    assert not probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask).shares_prompts
    disable(model)
    assert model.config._attn_implementation == "eager"


def test_a_copy_packs_too_and_a_saved_model_does_not_mention_packing(tmp_path):
    model, tokens = tiny_model("llama"), ragged_tokens()
    model.save_pretrained(tmp_path / "before")
    enable(model)
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("before", "after"))
    assert before == after
    values, again = (logprobs_of(m, tokens, 1.0) for m in (model, copy.deepcopy(model)))
    assert torch.equal(values, again)


@pytest.mark.parametrize("scores", [module.SCORES, 0], ids=["in memory", "fused"])
def test_in_bfloat16_packed_and_dense_differ_by_the_rounding_of_bf16(scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    model, tokens = tiny_model("qwen2"), ragged_tokens()
    set_precision(model, "bfloat16", torch.device("cpu"))
    with in_precision(model):
        packed, dense = (logprobs_of(model, tokens, 1.0, shared=packed) for packed in (True, False))
        packed.sum().backward()
    exact = logprobs_of(model, tokens, 1.0, shared=False)
    off = [(values - exact)[tokens.completion_mask].square().mean().sqrt().item() for values in (packed, dense)]
    assert off[0] < 1.5 * off[1]
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Shapes(TorchDispatchMode):
    """Remember the shape of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x)}
        return out


def test_no_tensor_is_as_large_as_the_row_squared():
    model, tokens = tiny_model("llama"), ragged_tokens((9,) * 8, num_generations=8, columns=5)
    length = 8 * 9 + int(tokens.completion_mask[:, 1:].sum())
    with Shapes() as shapes:
        logprobs_of(model, tokens, 1.0).sum().backward()
    assert any(length in shape for shape in shapes.seen)
    assert not [shape for shape in shapes.seen if sum(n >= length / 2 for n in shape if n not in (64, 128)) > 1]


@pytest.mark.parametrize(
    ("tokens", "filler"), [(31, 0), (33, 1), (34, 0), (65, 3), (1025, 63), (4095, 1), (4097, 255)]
)
def test_rows_with_a_common_beginning_come_in_few_lengths(tokens, filler):
    # in units of 1/32 to 1/16 of the row: 2 from 32 tokens on, 64 from 1024, 256 from 4096
    assert a_layout((tokens - 3,), (3,), common=2).filler == filler
    assert a_layout((tokens - 3,), (3,)).filler == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("common", [0, 4])
def test_off_the_cpu_lengths_are_rounded_without_changing_a_result(kind, common, monkeypatch):
    for name in ("SHARED_FROM", "SHARED_FROM_16_BITS"):
        monkeypatch.setattr(f"grpo.scoring.tokens.{name}", 2)
    model, tokens, found = tiny_model(kind), ragged_tokens((9, 7, 12), columns=11, common_prefix=common), []
    for is_queued in (False, True):
        monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], is_queued=is_queued))
        model.zero_grad()
        logprobs = logprobs_of(model, tokens)
        (logprobs * torch.linspace(-1, 1, logprobs.shape[1])).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach(), gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_off_the_cpu_few_shapes_occur(monkeypatch):
    def shapes():
        layouts = [a_layout((length + 3, length), (length, 0, 1, length)) for length in range(40, 60)]
        rows = {
            layout.filler + int(layout.prompt_lengths.sum() + layout.completion_lengths.sum()) for layout in layouts
        }
        return len(rows), len({layout.prompt_index.shape for layout in layouts})

    assert shapes() == (20, 20)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], is_queued=True))
    assert shapes() == (10, 3)
