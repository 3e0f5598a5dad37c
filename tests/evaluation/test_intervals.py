"""Intervals and pass@k against numbers derived by hand, exact enumeration, and simulation."""

from itertools import combinations
from math import sqrt

import numpy as np
import pytest
from scipy.stats import binom

from grpo.evaluation.intervals import maj_at_k, majority, paired_interval, pass_at_k, wilson_interval

N = 500
EASY = (0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99)


def exact_coverage(p):
    """Return the chance that the interval of N problems covers p, summed over all counts."""
    counts = np.arange(N + 1)
    held = [low <= p <= high for low, high in (wilson_interval(int(c), N) for c in counts)]
    return float(binom.pmf(counts, N, p)[held].sum())


@pytest.mark.parametrize("p", EASY)
def test_the_interval_covers_the_true_accuracy_in_93_to_97_of_100_evaluations(p):
    sampled = np.random.default_rng([0, int(1000 * p)]).binomial(N, p, 2000)
    covered = np.mean([low <= p <= high for low, high in (wilson_interval(int(c), N) for c in sampled)])
    assert 0.93 <= covered <= 0.97
    assert 0.93 <= exact_coverage(p) <= 0.97
    assert covered == pytest.approx(exact_coverage(p), abs=4 * sqrt(0.05 * 0.95 / 2000))


def test_the_exact_coverage_stays_near_95_between_these_accuracies():
    # Counts are whole numbers, so the coverage jumps from one p to the next. Only its mean is 95%.
    coverages = [exact_coverage(p) for p in np.linspace(0.3, 0.99, 691)]
    assert np.mean(coverages) == pytest.approx(0.95, abs=0.002)
    assert min(coverages) > 0.92
    assert max(coverages) < 0.975


def pairs(both, first, second, neither):
    """Return the answers of two models to the same problems; the arguments count the problems that each has right."""
    one = [True] * (both + first) + [False] * (second + neither)
    two = [True] * both + [False] * first + [True] * second + [False] * neither
    return one, two


def test_the_paired_interval_by_hand():
    # a 20, b 12, c 2, d 16 of n = 50 (Newcombe's form): p1 = 0.64, p2 = 0.44, d = p2 − p1 = −0.2.
    # Wilson: p1 in [0.50141, 0.75859], p2 in [0.31164, 0.57693] (z² = 3.84146, n = 50).
    # ad − bc = 320 − 24 = 296, less n/2 = 271; φ = 271 / √(32 · 18 · 22 · 28) = 271 / 595.66 = 0.45496.
    # low: x = p2 − l2 = 0.12836, y = u1 − p1 = 0.11859: √(x² − 2φxy + y²) = √0.016688 = 0.12918 → −0.32918.
    # high: x = u2 − p2 = 0.13693, y = p1 − l1 = 0.13859: √(0.018750 − 0.017268 + 0.019207) = 0.14384 → −0.05616.
    difference, low, high = paired_interval(*pairs(20, 12, 2, 16))
    assert difference == pytest.approx(-0.2)
    assert (low, high) == pytest.approx((-0.3292, -0.0562), abs=2e-4)


def test_the_paired_interval_is_mirrored_with_its_models_and_narrower_where_they_agree():
    one, two = pairs(20, 12, 2, 16)
    difference, low, high = paired_interval(one, two)
    assert paired_interval(two, one) == pytest.approx((-difference, -high, -low))
    _, low, high = paired_interval(*pairs(22, 10, 0, 18))
    _, wide_low, wide_high = paired_interval(*pairs(12, 20, 10, 8))  # the same accuracies with little agreement
    assert high - low < wide_high - wide_low


@pytest.mark.parametrize(
    "cells", [(9, 0, 0, 0), (0, 0, 0, 9), (0, 9, 0, 0), (0, 0, 9, 0), (1, 0, 0, 0), (4, 3, 0, 0)]
)
def test_the_paired_interval_holds_the_difference_in_the_corners(cells):
    difference, low, high = paired_interval(*pairs(*cells))
    assert -1 - 1e-12 <= low <= difference <= high <= 1 + 1e-12


@pytest.mark.parametrize(("one", "two"), [([], []), ([True], []), ([True], [True, False])])
def test_answers_to_other_problems_are_refused(one, two):
    with pytest.raises(ValueError, match="must answer the same problems"):
        paired_interval(one, two)


@pytest.mark.parametrize(
    "chances", [(0.3, 0.05, 0.3, 0.35), (0.85, 0.02, 0.1, 0.03), (0.05, 0.02, 0.9, 0.03), (0.93, 0.03, 0.03, 0.01)]
)
def test_the_paired_interval_covers_the_true_difference(chances):
    sampled = np.random.default_rng(0).multinomial(N, chances, 1000)
    true = chances[2] - chances[1]
    held = [low <= true <= high for _, low, high in (paired_interval(*pairs(*map(int, cells))) for cells in sampled)]
    assert 0.93 <= np.mean(held) <= 0.975


def test_pass_at_k_by_hand_and_by_enumeration():
    # With 4 samples and 1 right, 3 of the 6 pairs hold the right sample: 1 − C(3, 2) / C(4, 2) = 1 − 3/6.
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 3, 2) == 1.0  # no pair is wrong in both
    assert pass_at_k(4, 0, 4) == 0.0
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                chosen = list(combinations([i < correct for i in range(n)], k))
                assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(some) for some in chosen]))


def test_pass_at_k_is_unbiased():
    # For binomial c, its mean is 1 − (1 − p)^k. The mean of 1 − (1 − c/n)^k is not.
    n, k, p = 8, 4, 0.2
    chances = binom.pmf(range(n + 1), n, p)
    assert sum(x * pass_at_k(n, c, k) for c, x in enumerate(chances)) == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_counts_that_give_no_pass_at_k_are_refused(n, correct, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("answers", "place"),
    [
        ([], None),
        ([None, None], None),
        ([3], 0),
        ([None, 3], 1),
        ([3, 4, 4], 1),
        ([4, 3, 3, 4], 0),
        ([1, 2, 3, None], 0),
    ],
)
def test_the_majority_by_hand(answers, place):
    assert majority(answers) == place


def test_maj_at_k_by_hand():
    answers, right = [3, 4, 4, None, 5, 3], [False, True, True, False, False, False]
    assert maj_at_k(answers, right, 1) == pytest.approx(2 / 6)  # as pass@1
    assert maj_at_k(answers, right, 2) == pytest.approx(1 / 3)  # (3, 4) and (5, 3) are ties: the earlier
    assert maj_at_k(answers, right, 3) == pytest.approx(1 / 2)  # groups (3, 4, 4) and (-, 5, 3)
    assert maj_at_k(answers, right, 4) == 1.0  # group (3, 4, 4, -); the last two samples are left out
    assert maj_at_k([None] * 4, [False] * 4, 2) == 0.0


def test_maj_at_k_of_independent_samples_is_the_chance_of_the_majority():
    rng = np.random.default_rng(0)
    samples = rng.random((4000, 3)) < 0.6  # a sample is right with p = 0.6, two of three with 0.6³ + 3 · 0.6² · 0.4
    found = np.mean([maj_at_k([1 if x else 2 for x in some], list(map(bool, some)), 3) for some in samples])
    assert found == pytest.approx(0.648, abs=0.03)


@pytest.mark.parametrize("k", [0, 4])
def test_samples_that_give_no_maj_at_k_are_refused(k):
    with pytest.raises(ValueError, match="maj@"):
        maj_at_k([1, 2, 3], [True, True, False], k)
