"""Attention with the sums of its softmax, in value and gradient, and two parts of it joined."""

import math

import pytest
import torch

from grpo.model.attention import common_prefix as module
from grpo.model.attention.common_prefix import attend_with_sums


def some_vectors(seed=0, rows=3, length=4, keys=5, size=6):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, length, size), (rows, keys, size), (rows, keys, size + 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def plain(query, key, value, bias, scaling):
    scores = query @ key.transpose(1, 2) * scaling + (0 if bias is None else bias)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def test_by_hand():
    # scores ln 3 and 0: weights 3/4 and 1/4, their sum 4
    query, key = torch.tensor([[[1.0]]]), torch.tensor([[[math.log(3.0)], [0.0]]])
    out, sums = attend_with_sums(query, key, torch.tensor([[[8.0], [0.0]]]), None, 1.0)
    torch.testing.assert_close(out, torch.tensor([[[6.0]]]))
    torch.testing.assert_close(sums, torch.tensor([[math.log(4.0)]]))


@pytest.mark.parametrize("scores", [module.SCORES, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("bias", [None, "one", "each"])
def test_values_and_gradients_of_attention_and_of_its_sums(bias, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    vectors = some_vectors()
    if bias is not None:
        hidden = torch.rand(1 if bias == "one" else 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
        hidden[..., 0] = False
        bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -torch.inf)
    found, expected = (attend(*vectors, bias, 0.4) for attend in (attend_with_sums, plain))
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in expected]
    totals = (sum((x * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(total, vectors) for total in totals), strict=True):
        torch.testing.assert_close(a, b)


def test_two_parts_joined_by_their_sums_are_attention_to_both():
    query, key, value = some_vectors(keys=9)
    whole, _ = plain(query, key, value, None, 0.4)
    (out, sums), (other, other_sums) = (
        attend_with_sums(query, key[:, part], value[:, part], None, 0.4) for part in (slice(0, 3), slice(3, 9))
    )
    joined = torch.lerp(other, out, torch.sigmoid(sums - other_sums)[..., None])
    torch.testing.assert_close(joined, whole)
    weights = torch.linspace(-1, 2, whole.numel(), dtype=whole.dtype).view_as(whole)
    gradients = [torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (joined, whole)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_that_sees_nothing_has_no_part_in_a_join_and_no_gradient():
    query, key, value = some_vectors(rows=1, length=2)
    bias = torch.zeros(1, 2, 5, dtype=torch.float64)
    bias[0, 1] = -torch.inf
    out, sums = attend_with_sums(query, key, value, bias, 0.4)
    assert sums[0, 1] == -torch.inf
    assert not out[0, 1].any()
    share = torch.sigmoid(sums - 1.0)
    (out * share[..., None]).sum().backward()
    assert query.grad[0, 0].any()
    assert all(x.grad.isfinite().all() for x in (query, key, value))
    assert not query.grad[0, 1].any()


def test_of_bfloat16_products_are_in_it_and_sums_in_float32():
    vectors = [x.detach().bfloat16() for x in some_vectors()]
    exact, exact_sums = attend_with_sums(*(x.float() for x in vectors), None, 0.4)
    out, sums = attend_with_sums(*vectors, None, 0.4)
    assert (out.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    torch.testing.assert_close(sums, exact_sums, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_attention_gives_the_same_as_scores_in_memory(dtype, monkeypatch):
    generator, found = torch.Generator().manual_seed(0), []
    vectors = [torch.randn(2, n, 16, generator=generator).to(dtype) for n in (40, 9, 9)]
    for types in (module.FUSED_TYPES, ()):
        monkeypatch.setattr(module, "FUSED_TYPES", types)
        inputs = [x.clone().requires_grad_() for x in vectors]
        out, sums = attend_with_sums(*inputs, None, 0.3)
        assert (out.dtype, sums.dtype, out.is_contiguous()) == (dtype, torch.float32, True)
        gradients = torch.autograd.grad((out.float() * 0.7).sum() + (sums * 0.2).sum(), inputs)
        found.append([out.detach(), sums.detach(), *gradients])
    assert module.FUSED_TYPES == ()
    off = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=off, rtol=off)
