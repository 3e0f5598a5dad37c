"""Estimates with their uncertainty: a proportion, a paired difference, a mean; pass@k and maj@k. Pure functions."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import comb, sqrt
from statistics import fmean, stdev
from typing import Any

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764)  # of Student's t with 1 to 4 degrees of freedom


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a proportion, which stays inside [0, 1] and is accurate near its ends.

    E. B. Wilson (1927), J. Am. Stat. Assoc. 22, 209.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes in {n} trials is not a proportion")
    low, high = wilson(successes / n, n)
    return max(0.0, low), min(1.0, high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a share of n, which need not be a whole number of them; NaN for NaN."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(max(0.0, share * (1 - share)) / n + Z**2 / (4 * n**2))
    return centre - half, centre + half


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """Return how much more often `second` is right than `first` on the same problems: p2 − p1, low, high (95%).

    R. G. Newcombe (1998), Statistics in Medicine 17, 2635, method 10: the distances of both proportions from the ends
    of their Wilson intervals, joined with the correlation of the pairs,

        low = d − √((p2 − l2)² − 2φ(p2 − l2)(u1 − p1) + (u1 − p1)²), high likewise with (u2 − p2) and (p1 − l1),

    where, with a both right, b and c one of them, d none of n, φ = (ad − bc) / √((a + b)(c + d)(a + c)(b + d)); its
    numerator is lowered by n/2, to 0 at the least, where it is above 0; φ = 0 where a margin is empty.
    """
    n = len(first)
    if n == 0 or len(second) != n:
        raise ValueError(f"{n} and {len(second)} answers are not of the same problems")
    a = sum(x and y for x, y in zip(first, second, strict=True))
    b, c = sum(first) - a, sum(second) - a
    d = n - a - b - c
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    numerator = a * d - b * c
    numerator = max(numerator - n / 2, 0) if numerator > 0 else numerator
    phi = numerator / sqrt(margins) if margins else 0.0
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = wilson_interval(a + b, n), wilson_interval(a + c, n)

    def joined(x: float, y: float) -> float:
        return sqrt(max(0.0, x**2 - 2 * phi * x * y + y**2))

    difference = (c - b) / n
    return difference, difference - joined(p2 - l2, u1 - p1), difference + joined(u2 - p2, p1 - l1)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of `k` samples is right, given `correct` right of n ≥ k: 1 − C(n − c, k) / C(n, k).

    Unbiased, unlike 1 − (1 − c/n)^k. Chen et al. (2021), arXiv:2107.03374, equation 1.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be had from {correct} right of {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def accuracy_text(entry: Mapping[str, Any]) -> str:
    """Format an accuracy with its interval and n: 97.2% [95.4, 98.3], n = 500."""
    low, high = 100 * entry["ci_low"], 100 * entry["ci_high"]
    return f"{100 * entry['accuracy']:.1f}% [{low:.1f}, {high:.1f}], n = {entry['n']}"


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Return the place of the answer that most samples gave, the earliest of equals; None if no sample gave any."""
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(votes, key=votes.__getitem__)) if votes else None


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """Return how often the majority of k samples is right (Wang et al., arXiv:2203.11171), None being no vote.

    It is the mean over the n // k groups of k that the n samples fall into, in order.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(right):
        raise ValueError(f"maj@{k} cannot be had from {len(answers)} answers")
    starts = range(0, len(answers) - k + 1, k)
    chosen = [(start, majority(answers[start : start + k])) for start in starts]
    return fmean(place is not None and right[start + place] for start, place in chosen)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of two or more values with its 95% interval by Student's t: mean, low, high."""
    n, mean = len(values), fmean(values)
    error = stdev(values) / sqrt(n)
    return mean, mean - t_quantile(n - 1) * error, mean + t_quantile(n - 1) * error


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t: from tables up to 4 degrees of freedom, off by 0.2% at most above.

    The expansion is Abramowitz and Stegun's 26.7.5.
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    v, z = degrees, Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))
