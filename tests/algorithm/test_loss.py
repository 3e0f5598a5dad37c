"""The objective, against hand-derived values and gradients and an independent computation in plain Python."""

import math
from dataclasses import replace

import pytest
import torch

from grpo import config
from grpo.algorithm.advantages import SCALES
from grpo.algorithm.loss import (
    AVERAGES,
    KL_ESTIMATORS,
    RATIOS,
    StepSizes,
    clipped_surrogate,
    grpo_loss,
    sequence_ratio,
    token_kl,
    token_ratio,
)
from grpo.config import TrainConfig


def loss_of(logprobs, old, ref, advantages, mask, config=None, **settings):
    """Return the averaged loss of a step that is all in one micro-batch, and its tokens; settings as options."""
    config = config or TrainConfig(**settings)
    tokens = grpo_loss(logprobs, old, ref, advantages, mask, config, config.beta)
    sizes = StepSizes(mask.shape[0], int(mask.sum()), config.max_new_tokens)
    return replace(tokens, loss=AVERAGES[config.loss_average](tokens.loss, mask, sizes))


def test_loss_and_gradient_by_hand():
    # Two completions of 2 and 1 tokens, epsilon 0.2, beta 0.5, advantages +1 and −1.
    #   token a: log π − log π_old = log 1.5, A = +1: clipped at 1.2, gradient of the surrogate 0
    #   token b: ratio 0.9, A = +1: inside the range, surrogate 0.9, gradient 0.9
    #   token c: ratio 1.1, A = −1: inside, surrogate −1.1, gradient −1.1
    # Δ = log π_ref − log π: a: −log 2, k3 = 0.5 + log 2 − 1; b: 0, k3 = 0; c: log 3, k3 = 3 − log 3 − 1.
    # dk3/dlog π = 1 − e^Δ: a: 0.5, b: 0, c: −2.
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    shift = torch.tensor([[math.log(1.5), math.log(0.9)], [math.log(1.1), 0.0]])
    delta = torch.tensor([[-math.log(2), 0.0], [math.log(3), 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages, old, ref = torch.tensor([1.0, -1.0]), (logprobs - shift).detach(), (logprobs + delta).detach()
    result = loss_of(logprobs, old, ref, advantages, mask, epsilon=0.2, beta=0.5)
    k3_a, k3_c = 0.5 + math.log(2) - 1, 3 - math.log(3) - 1
    first = ((1.2 - 0.5 * k3_a) + 0.9) / 2  # mean over its two tokens
    second = -1.1 - 0.5 * k3_c
    assert result.loss.item() == pytest.approx(-(first + second) / 2, abs=1e-6)
    result.loss.backward()
    # −(1/2)(1/length)(surrogate gradient − beta · dk3): a: −(1/4)(0 − 0.25); b: −(1/4)(0.9); c: −(1/2)(−1.1 + 1)
    expected = torch.tensor([[0.0625, -0.225], [0.05, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-6, rtol=1e-5)
    assert result.clipped.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.5, 2.0, 1.2 * 2.0, 0.0),  # good and already more likely: stop
        (0.5, 2.0, 0.5 * 2.0, 2.0),  # good but less likely: full push up
        (1.5, -2.0, 1.5 * -2.0, -2.0),  # bad but more likely: full push down
        (0.5, -2.0, 0.8 * -2.0, 0.0),  # bad and already less likely: stop
    ],
)
def test_the_four_quadrants_of_clipping(ratio, advantage, value, gradient):
    r = torch.tensor([[ratio]], requires_grad=True)
    surrogate = clipped_surrogate(r, torch.tensor([advantage]), 0.2, 0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value, abs=1e-6)
    assert r.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_the_mean_of_k3_on_samples_is_the_exact_kl():
    # exact expectation, no sampling: sum over the vocabulary of π · k3 must be KL(π ‖ ref), not χ² − KL
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    k3 = token_kl(policy.log(), reference.log())
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    assert (policy * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx(0.3733860, abs=1e-7)
    # the other way round it is χ² − KL: 0.49/0.3 + 0.04/0.3 + 0.01/0.4 − 1 − KL
    wrong_way_round = (policy * token_kl(reference.log(), policy.log())).sum().item()
    assert wrong_way_round == pytest.approx(0.7916667 - exact, abs=1e-6)


def test_k3_is_never_negative_and_zero_only_where_equal():
    a = torch.linspace(-8, 0, 50)
    kl = token_kl(a, a.flip(0))
    assert bool((kl >= 0).all())
    assert token_kl(a, a).abs().max() == 0


def test_k3_of_a_hopeless_token_is_finite_and_so_is_its_gradient():
    logprobs = torch.tensor([[-200.0, -0.1]], requires_grad=True)
    kl = token_kl(logprobs, torch.tensor([[-0.1, -200.0]]))
    kl.sum().backward()
    assert bool(torch.isfinite(kl).all())
    assert bool(torch.isfinite(logprobs.grad).all())


def test_first_update_has_ratio_one_and_the_gradient_of_reinforce():
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(4, 5, generator=generator)
    logprobs.requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.25, 0.0])
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1, 0, 0, 0, 0], [1] * 5]).bool()
    result = loss_of(logprobs, logprobs.detach(), None, advantages, mask, epsilon=0.2, beta=0.0)
    assert bool((result.ratio == 1).all())
    assert not result.clipped.any()
    result.loss.backward()
    # REINFORCE: −A_i ∇ log π, averaged over tokens, then completions
    expected = -advantages[:, None] * mask / mask.sum(-1, keepdim=True) / 4
    torch.testing.assert_close(logprobs.grad, expected)


def test_masked_tokens_get_exactly_no_gradient_whatever_stands_there():
    logprobs = torch.tensor([[-1.0, float("nan"), float("-inf")]], requires_grad=True)
    old, mask = torch.tensor([[-1.1, -1.0, -1.0]]), torch.tensor([[True, False, False]])
    result = loss_of(logprobs, old, old, torch.tensor([1.0]), mask, epsilon=0.2, beta=0.1)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    # The one real token has d = 0.1, loss −e^d + 0.1 · (e^−d + d − 1), gradient −e^d + 0.1 · (1 − e^−d)
    assert logprobs.grad[0, 0].item() == pytest.approx(-math.exp(0.1) + 0.1 * (1 - math.exp(-0.1)), abs=1e-6)
    assert logprobs.grad[0, 1:].tolist() == [0.0, 0.0]


def test_an_empty_mask_gives_a_loss_of_zero_not_nan():
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    result = loss_of(logprobs, logprobs.detach(), None, torch.ones(2), mask, epsilon=0.2, beta=0.0)
    result.loss.backward()
    assert result.loss.item() == 0
    assert logprobs.grad.abs().sum() == 0


def independent_loss(logprobs, old, ref, advantages, lengths, c):
    """Return the loss by the formulas of the papers, in plain Python floats, one token at a time."""
    sums = []
    for i, length in enumerate(lengths):
        total = 0.0
        for t in range(length):
            if c.ratio == "sequence":
                ratio = math.exp(sum(logprobs[i][s] - old[i][s] for s in range(length)) / length)
            else:
                ratio = math.exp(logprobs[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - c.epsilon), 1 + (c.epsilon_high or c.epsilon))
            d = ref[i][t] - logprobs[i][t]
            k3 = math.exp(d) - d - 1
            if c.kl_estimator == "k3-corrected":
                k3 *= math.exp(logprobs[i][t] - old[i][t])
            total += min(ratio * advantages[i], clipped * advantages[i]) - c.beta * k3
        sums.append(total)
    if c.loss_average == "completion":
        return -sum(value / length for value, length in zip(sums, lengths, strict=True)) / len(lengths)
    denominator = sum(lengths) if c.loss_average == "token" else len(lengths) * c.max_new_tokens
    return -sum(sums) / denominator


VARIANTS = [
    {},
    {"loss_average": "token"},
    {"loss_average": "constant", "max_new_tokens": 9},
    {"epsilon_high": 0.5},
    {"ratio": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
    {"ratio": "sequence", "loss_average": "token", "epsilon": 0.3},
    {"kl_estimator": "k3-corrected"},
    {"kl_estimator": "k3-corrected", "ratio": "sequence", "epsilon": 0.3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_random_batches_agree_with_an_independent_computation_in_value_and_gradient(seed, variant):
    c = TrainConfig(**{"epsilon": 0.2, "beta": 0.3, **variant})
    generator = torch.Generator().manual_seed(seed)
    shape, lengths = (6, 7), torch.randint(1, 8, (6,), generator=generator).tolist()
    draws = [-3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    logprobs, old, ref = draws
    logprobs.requires_grad_()
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    result = loss_of(logprobs, old, ref, advantages, mask, c)
    result.loss.backward()
    plain = [x.tolist() for x in (logprobs.detach(), old, ref, advantages)]
    assert result.loss.item() == pytest.approx(independent_loss(*plain, lengths, c), abs=1e-10)
    for i, t in ((0, 0), (2, 1), (5, 6)):  # central differences at a few places, masked ones among them
        sides = []
        for h in (1e-6, -1e-6):
            moved = [row[:] for row in plain[0]]
            moved[i][t] += h
            sides.append(independent_loss(moved, *plain[1:], lengths, c))
        assert logprobs.grad[i, t].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)


def test_the_three_averages_by_hand():
    # completions of 3 and 1 tokens, values 1 + 2 + 3 and 5, at most 4 tokens each:
    #   completion: (6/3 + 5/1) / 2 = 3.5; token: 11/4 = 2.75; constant: 11 / (2 · 4) = 1.375
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sizes = StepSizes(num_completions=2, num_tokens=4, max_new_tokens=4)
    averages = [AVERAGES[how](values, mask, sizes).item() for how in ("completion", "token", "constant")]
    assert averages == [3.5, 2.75, 1.375]


def test_the_sequence_ratio_by_hand():
    # token ratios 2, 1/2 · e, 1 (masked: e^9): the geometric mean of 2 and e/2 is sqrt(e); then 3 alone
    old = torch.zeros(2, 3)
    logprobs = torch.tensor([[math.log(2), 1 - math.log(2), 9.0], [math.log(3), 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ratio = sequence_ratio(logprobs, old, mask)
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(0.5)] * 3, [3.0] * 3]))
    assert bool((sequence_ratio(old, old, mask) == 1).all())


def test_gspo_gives_every_token_of_a_completion_the_same_push():
    # one completion of 4 tokens, ratio 1, A = 2: loss −s·A, ds/dlog π_t = s/4, so each gradient is −2/4
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -0.1]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss_of(logprobs, logprobs.detach(), None, torch.tensor([2.0]), mask, ratio="sequence", beta=0.0).loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.full((1, 4), -0.5))


def test_clipping_higher_leaves_room_above_only():
    # DAPO: ratio 1.25 is clipped at 1.2, but not at 1.28; below, nothing changes
    for epsilon_high, value in ((0.2, 1.2), (0.28, 1.25)):
        r = torch.tensor([[1.25]])
        assert clipped_surrogate(r, torch.tensor([1.0]), 0.2, epsilon_high).item() == pytest.approx(value)
        r = torch.tensor([[0.7]])
        assert clipped_surrogate(r, torch.tensor([-1.0]), 0.2, epsilon_high).item() == pytest.approx(-0.8)


def test_the_ratio_is_clamped_where_it_would_overflow():
    assert math.isfinite(token_ratio(torch.tensor([0.0]), torch.tensor([-1000.0]), torch.tensor([True])).item())


def test_every_choice_of_a_variant_is_a_function():
    assert set(config.RATIOS) == set(RATIOS)
    assert set(config.AVERAGES) == set(AVERAGES)
    assert set(config.SCALES) == set(SCALES)
    assert set(config.KL_ESTIMATORS) == set(KL_ESTIMATORS)


@pytest.mark.parametrize(
    ("delta", "value", "gradient"),
    [
        (math.log(3), 3 - math.log(3) - 1, -2.0),  # dk3/dlog π = 1 − e^Δ
        (-25.0, 24.0, 1.0),  # 25 nats more likely than under the reference: the linear term pulls back
        (-1000.0, 999.0, 1.0),
        (25.0, math.exp(20) - 21, 0.0),  # beyond the clamp: finite, and not pushed further away
    ],
)
def test_k3_far_from_the_reference(delta, value, gradient):
    logprobs = torch.tensor([-1.0], requires_grad=True)
    kl = token_kl(logprobs, torch.tensor([-1.0 + delta]))
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-5)


def test_the_gradient_of_the_corrected_kl_is_that_of_the_kl_to_the_reference():
    # On the first pass the gradient of a token is −Δ ∇log p. Its mean over samples of the policy p is the sum of
    # p (log p − log q) ∇log p, which is the gradient of KL(p ‖ q). Plain k3 has the gradient of KL(q ‖ p). The test
    # sums over all outcomes instead of sampling them.
    logits, q = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3]).double()

    def gradient(loss):
        x = logits.clone().requires_grad_()
        loss(x.log_softmax(-1)).backward()
        return x.grad

    p = logits.softmax(-1)
    expected = gradient(lambda logp: (logp.exp() * (logp - q.log())).sum())
    other = gradient(lambda logp: (q * (q.log() - logp)).sum())

    def estimated(name):
        def loss(logp):
            return (p * KL_ESTIMATORS[name](token_kl(logp, q.log()), logp, p.log())).sum()

        return gradient(loss)

    torch.testing.assert_close(estimated("k3-corrected"), expected)
    torch.testing.assert_close(estimated("k3"), other)
    assert not torch.allclose(expected, other)
