"""Attention to a part of the keys, the sums of its softmax, and the gradients of joined parts."""

import math

import pytest
import torch

from grpo.scoring.attention import partial as module
from grpo.scoring.attention.layout import as_bias
from grpo.scoring.attention.partial import PartialAttention, joined


def some_vectors(seed=0, rows=3, length=4, keys=5, size=6, more=1):
    """Return random queries, keys and values, float64 with gradients; values have `more` columns than the others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, length, size), (rows, keys, size), (rows, keys, size + more)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def plain(query, key, value, bias, scaling):
    """Compute attention to all keys, and the logarithms of its softmax sums."""
    scores = query @ key.transpose(1, 2) * scaling + (0 if bias is None else bias)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def a_bias(rows):
    """Return a bias that hides random keys, but never the first."""
    hidden = torch.rand(rows, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[..., 0] = False
    return as_bias(~hidden, torch.float64)


def test_by_hand():
    # scores ln 3 and 0: weights 3/4 and 1/4, their sum 4
    query, key = torch.tensor([[[1.0]]]), torch.tensor([[[math.log(3.0)], [0.0]]])
    out, sums = PartialAttention(query, key, torch.tensor([[[8.0], [0.0]]]), None, 1.0).run()
    torch.testing.assert_close(out, torch.tensor([[[6.0]]]))
    torch.testing.assert_close(sums, torch.tensor([[math.log(4.0)]]))


def test_a_join_by_hand():
    # sums 3 and 1: weights 3/4 and 1/4, the joint sum 4
    out, sums = joined(*(torch.tensor(x) for x in ([[8.0]], [math.log(3.0)], [[4.0]], [0.0])))
    torch.testing.assert_close(out, torch.tensor([[7.0]]))
    torch.testing.assert_close(sums, torch.tensor([math.log(4.0)]))


@pytest.mark.parametrize("scores", [module.SCORES, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("bias", [None, a_bias(1), a_bias(3)], ids=["all seen", "one bias", "one each"])
def test_values_and_gradients_of_all_keys(bias, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    vectors = some_vectors()
    part = PartialAttention(*(x.detach() for x in vectors), bias, 0.4)
    out, sums = part.run()
    expected, expected_sums = plain(*vectors, bias, 0.4)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(sums, expected_sums.detach())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad((expected * weights).sum(), vectors)
    for a, b in zip(part.gradients(weights, out, sums), gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("dtype", "types"), [(torch.float64, ()), (torch.float32, ()), (torch.float32, module.FUSED_TYPES)]
)
def test_parts_joined_are_attention_to_all_keys_in_value_and_gradient(dtype, types, monkeypatch):
    monkeypatch.setattr(module, "FUSED_TYPES", types)
    vectors = [x.detach().to(dtype).requires_grad_() for x in some_vectors(keys=9, more=0)]
    whole, sums = plain(*vectors, None, 0.4)
    query, key, value = (x.detach() for x in vectors)
    cuts = slice(0, 3), slice(3, 9)
    parts = [PartialAttention(query, key[:, cut], value[:, cut], None, 0.4) for cut in cuts]
    out, joint = joined(*parts[0].run(), *parts[1].run())
    torch.testing.assert_close(out, whole.detach())
    torch.testing.assert_close(joint, sums.detach())
    weights = torch.linspace(-1, 2, whole.numel(), dtype=whole.dtype).view_as(whole)
    first = parts[0].gradients(weights, out, joint)
    second = parts[1].gradients(weights, out, joint)
    grad_query = first[0] + second[0]
    grad_key = torch.cat([first[1], second[1]], 1)
    grad_value = torch.cat([first[2], second[2]], 1)
    expected = torch.autograd.grad((whole * weights).sum(), vectors)
    for a, b in zip((grad_query, grad_key, grad_value), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_that_sees_none_of_the_keys_has_no_part_in_a_join_and_no_gradient():
    query, key, value = (x.detach() for x in some_vectors(rows=1, length=2))
    bias = as_bias(torch.tensor([True, False])[None, :, None].expand(1, 2, 5), torch.float64)
    part = PartialAttention(query, key, value, bias, 0.4)
    out, sums = part.run()
    assert sums[0, 1] < -1e300
    assert out.isfinite().all()
    other = torch.ones_like(out)
    whole, joint = joined(out, sums, other, torch.zeros_like(sums))
    assert whole[0, 1].tolist() == other[0, 1].tolist()
    grad_query, grad_key, grad_value = part.gradients(other, whole, joint)
    assert grad_query[0, 0].any()
    assert not grad_query[0, 1].any()
    assert grad_key.isfinite().all()
    assert grad_value.isfinite().all()


def test_a_row_that_sees_none_of_the_keys_has_no_part_in_a_join_of_torchs_own_attention_either():
    query, key, value = (x.detach().bfloat16() for x in some_vectors(rows=1, length=2, more=0))
    bias = as_bias(torch.zeros(1, 2, 5, dtype=torch.bool), torch.bfloat16)
    out, sums = PartialAttention(query, key, value, bias, 0.4).run()
    other = torch.ones_like(out)
    assert joined(out, sums, other, torch.full_like(sums, -50.0))[0].tolist() == other.tolist()
    assert joined(other, torch.full_like(sums, -50.0), out, sums)[0].tolist() == other.tolist()


def test_a_row_without_a_result_has_no_gradient_however_large_its_scores():
    query, key, value = (1e30 * x.detach() for x in some_vectors(rows=1, length=2))
    out, none = torch.zeros(1, 2, 7, dtype=torch.float64), torch.full((1, 2), torch.inf, dtype=torch.float64)
    for gradient in PartialAttention(query, key, value, None, 0.4).gradients(out, out, none):
        assert not gradient.any()


def test_products_of_bfloat16_vectors_are_in_bfloat16_and_sums_in_float32():
    vectors = [x.detach().bfloat16() for x in some_vectors()]
    exact, exact_sums = PartialAttention(*(x.float() for x in vectors), None, 0.4).run()
    out, sums = PartialAttention(*vectors, None, 0.4).run()
    assert (out.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    torch.testing.assert_close(sums, exact_sums, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2], ids=["all seen", "one bias", "one each"])
def test_torchs_own_attention_gives_the_same_as_scores_in_memory(rows, dtype, monkeypatch):
    generator, found = torch.Generator().manual_seed(0), []
    vectors = [torch.randn(2, n, 16, generator=generator).to(dtype) for n in (40, 9, 9)]
    seen = torch.rand(rows, 40, 9, generator=generator) < 0.6
    seen[..., 4] = True
    part = PartialAttention(*vectors, as_bias(seen, dtype) if rows else None, 0.3)
    for types in (module.FUSED_TYPES, ()):
        monkeypatch.setattr(module, "FUSED_TYPES", types)
        out, sums = part.run()
        assert (out.dtype, sums.dtype, out.is_contiguous()) == (dtype, torch.float32, True)
        # the joint sums are larger than those of this part
        found.append([out, sums, *part.gradients(torch.full_like(out, 0.7), 0.5 * out, sums + 0.2)])
    assert module.FUSED_TYPES == ()
    off = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=off, rtol=off)
