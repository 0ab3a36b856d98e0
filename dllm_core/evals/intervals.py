"""Intervals for few, noisy values: distribution-free where there are enough of them, else Student's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Literal

LEVEL = 0.95
TIE_BAND = 0.03
Verdict = Literal["tie", "faster", "slower", "not resolved"]


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval.

    Attributes:
        value: the estimate.
        low: lower end; None with a single value.
        high: upper end; None with a single value.
        assumes_normal: too few values (under 6 at 95 %) for an interval that assumes nothing: Student's t was used.
    """

    value: float
    low: float | None
    high: float | None
    assumes_normal: bool = False

    def as_list(self) -> list[float | None]:
        """Return [low, high]."""
        return [self.low, self.high]


def student_probability(t: float, df: int) -> float:
    """Return P(|T| < t) for Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range((df - 1) // 2 if odd else df // 2):
        if k:
            term *= math.cos(angle) ** 2 * (2 * k - 1 + odd) / (2 * k + odd)
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def student_quantile(level: float, df: int) -> float:
    """Return the t with P(|T| < t) = level: half the width of a two-sided interval in standard errors."""
    low, high = 0.0, 1.0
    while student_probability(high, df) < level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_probability(middle, df) < level else (low, middle)
    return high


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the median and the interval between two order statistics that covers it with at least `level`.

    P(x_(j+1) < median < x_(n-j)) = 1 - 2 * sum_{i<=j} C(n, i) / 2^n whatever the (continuous) distribution; j is the
    largest that keeps the level. Below 6 values even the full range covers the median with less than 95 %; then it is
    Student's interval of the mean around the median.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail, cut = 0.0, -1
    while cut + 1 < n:
        tail += math.comb(n, cut + 1) / 2**n
        if 2 * tail > 1 - level:
            break
        cut += 1
    if cut < 0:
        return _student(ordered, median(ordered), level)
    return Interval(median(ordered), ordered[cut], ordered[n - 1 - cut])


def positive_median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the median of positive values and its interval, taken over their logarithms.

    Order statistics do not care; Student's interval of two or three timings would reach below zero otherwise.
    """
    found = median_interval([math.log(v) for v in values], level)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(median(values), low, high, found.assumes_normal)


def _student(values: Sequence[float], centre: float, level: float) -> Interval:
    n = len(values)
    if n < 2:
        return Interval(centre, None, None, assumes_normal=True)
    half = student_quantile(level, n - 1) * stdev(values) / math.sqrt(n)
    middle = mean(values)
    return Interval(centre, min(centre, middle - half), max(centre, middle + half), assumes_normal=True)


def _signed_rank_cut(n: int, level: float) -> int:
    """Return the largest w with P(W <= w) <= (1 - level) / 2 for Wilcoxon's signed-rank statistic, or -1."""
    top = n * (n + 1) // 2
    ways = [1] + [0] * top
    for rank in range(1, n + 1):
        for total in range(top, rank - 1, -1):
            ways[total] += ways[total - rank]
    # integers throughout: the 2^n sign patterns are counted exactly
    limit = (1 - level) / 2 * 2**n
    cumulated = 0
    for w in range(top + 1):
        cumulated += ways[w]
        if cumulated > limit:
            return w - 1
    return top


def centre_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the Hodges-Lehmann centre and its signed-rank interval: exact if the values are symmetric about it.

    Logarithms of paired timing ratios are: swapping two rows of equal speed flips the sign and changes nothing else.
    Narrower than the median's interval and as deaf to an outlier. Below 6 values (at 95 %; 9 at 99.6 %) it is Student's
    interval of the mean.
    """
    n = len(values)
    walsh = sorted((values[i] + values[j]) / 2 for i in range(n) for j in range(i, n))
    cut = _signed_rank_cut(n, level)
    if cut < 0:
        return _student(values, median(walsh), level)
    return Interval(median(walsh), walsh[cut], walsh[len(walsh) - 1 - cut])


def ratio_interval(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the paired ratio first / second of positive values with its interval, through its logarithm."""
    centre = centre_interval([math.log(a / b) for a, b in zip(first, second, strict=True)], level)
    low, high = (None if end is None else math.exp(end) for end in (centre.low, centre.high))
    return Interval(math.exp(centre.value), low, high, centre.assumes_normal)


def verdict(ratio: Interval, band: float = TIE_BAND) -> Verdict:
    """Say what a ratio's interval proves.

    `tie` only if the whole interval lies within the band (1 / 1.03 to 1.03, so that swapping the rows changes
    nothing); that two intervals overlap proves nothing. `faster` or `slower` if it excludes 1. Else, or with too few
    rounds for an interval that assumes nothing, `not resolved`.
    """
    if ratio.low is None or ratio.high is None or ratio.assumes_normal:
        return "not resolved"
    if 1 / (1 + band) <= ratio.low and ratio.high <= 1 + band:
        return "tie"
    if ratio.low > 1:
        return "faster"
    if ratio.high < 1:
        return "slower"
    return "not resolved"
