"""Estimate proportions, paired differences and means with 95% intervals, and pass@k and maj@k; pure functions."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import comb, sqrt
from statistics import fmean, stdev
from typing import Any

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764)  # 97.5% quantiles of Student's t with 1 to 4 degrees of freedom


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a proportion, inside [0, 1] and accurate near 0 and 1: low, high.

    E. B. Wilson (1927), J. Am. Stat. Assoc. 22, 209. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes in {n} trials is not a proportion")
    low, high = wilson(successes / n, n)
    return max(0.0, low), min(1.0, high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95% interval of a share of n: low, high. `share` · n need not be whole; NaN gives NaN."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(max(0.0, share * (1 - share)) / n + Z**2 / (4 * n**2))
    return centre - half, centre + half


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """Return how much more often `second` is right than `first` on the same problems: p2 − p1, low, high (95%).

    R. G. Newcombe (1998), Statistics in Medicine 17, 2635, method 10. With Wilson intervals [l1, u1] and [l2, u2],

        low  = p2 − p1 − √((p2 − l2)² − 2φ(p2 − l2)(u1 − p1) + (u1 − p1)²)
        high = p2 − p1 + √((u2 − p2)² − 2φ(u2 − p2)(p1 − l1) + (p1 − l1)²)

    φ = (ad − bc) / √((a + b)(c + d)(a + c)(b + d)), where a problems are right in both, b only in the first, c only
    in the second, and d in neither. A positive numerator is lowered by n/2, but not below 0. φ = 0 if the root is 0.
    Raises ValueError if there are no answers, or if the lengths differ.
    """
    n = len(first)
    if n == 0 or len(second) != n:
        raise ValueError(f"cannot compare {n} and {len(second)} answers: both models must answer the same problems")
    a = sum(x and y for x, y in zip(first, second, strict=True))
    b = sum(first) - a
    c = sum(second) - a
    d = n - a - b - c
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    numerator = a * d - b * c
    numerator = max(numerator - n / 2, 0) if numerator > 0 else numerator
    phi = numerator / sqrt(margins) if margins else 0.0
    p1 = (a + b) / n
    p2 = (a + c) / n
    l1, u1 = wilson_interval(a + b, n)
    l2, u2 = wilson_interval(a + c, n)

    def distance(x: float, y: float) -> float:
        return sqrt(max(0.0, x**2 - 2 * phi * x * y + y**2))

    difference = (c - b) / n
    return difference, difference - distance(p2 - l2, u1 - p1), difference + distance(u2 - p2, p1 - l1)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return 1 − C(n − c, k) / C(n, k), an unbiased estimate of the chance that any of `k` samples is right.

    c = `correct` of n samples are right. Chen et al. (2021), arXiv:2107.03374, equation 1; ValueError if k > n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {correct} right of {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def accuracy_text(entry: Mapping[str, Any]) -> str:
    """Format an accuracy with its interval and n, such as 97.2% [95.4, 98.3], n = 500."""
    low, high = 100 * entry["ci_low"], 100 * entry["ci_high"]
    return f"{100 * entry['accuracy']:.1f}% [{low:.1f}, {high:.1f}], n = {entry['n']}"


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Return the index of the most frequent answer, in a tie the earliest; None if no sample has an answer."""
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(votes, key=votes.__getitem__)) if votes else None


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """Return how often the majority answer of k samples is right (Wang et al., arXiv:2203.11171).

    An answer of None has no vote. The result is the mean over n // k groups: the first k of the n samples, the next
    k, and so on. Raises ValueError if k > n.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(right):
        raise ValueError(f"maj@{k} cannot be estimated from {len(answers)} answers")
    starts = range(0, len(answers) - k + 1, k)
    indices = [(start, majority(answers[start : start + k])) for start in starts]
    return fmean(index is not None and right[start + index] for start, index in indices)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of two or more values with its 95% interval by Student's t: mean, low, high."""
    mean = fmean(values)
    half = t_quantile(len(values) - 1) * (stdev(values) / sqrt(len(values)))
    return mean, mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t for a number of degrees of freedom.

    Up to 4 degrees, it is in a table. Beyond, it is expansion 26.7.5 of Abramowitz and Stegun, accurate within 0.2%.
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / degrees + second / degrees**2 + third / degrees**3
