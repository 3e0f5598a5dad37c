"""Wilson's interval of an accuracy: against scipy, by hand, and at its limits."""

import pytest
from scipy.stats import binomtest

from grpo.evaluation.intervals import wilson_interval


@pytest.mark.parametrize("n", [1, 2, 8, 10, 100, 500, 829, 1000])
def test_the_interval_agrees_with_scipy(n):
    for successes in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_by_hand():
    # z² = 3.8415. 0 of 10: centre = half = (z²/20) / (1 + z²/10) = 0.19207 / 1.38415 = 0.13877, so [0, 0.27753].
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-15)
    assert high == pytest.approx(0.27753, abs=5e-6)
    # 5 of 10: centre 1/2; half = 1.95996 / 1.38415 · √(0.025 + 0.0096037) = 1.41600 · 0.186021 = 0.26341.
    assert wilson_interval(5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)


@pytest.mark.parametrize("n", [1, 3, 10, 829, 10**6])
def test_the_interval_stays_in_range_holds_the_proportion_and_is_symmetric(n):
    for successes in sorted({0, 1, n // 2, n - 1, n}):
        low, high = wilson_interval(successes, n)
        assert 0.0 <= low < high <= 1.0
        assert low - 1e-12 <= successes / n <= high + 1e-12
        mirrored = wilson_interval(n - successes, n)
        assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    assert wilson_interval(0, n)[0] == pytest.approx(0.0, abs=1e-15)
    assert wilson_interval(n, n)[1] == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (-1, -1), (0, -5)])
def test_what_is_no_proportion_is_refused(successes, n):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, n)
