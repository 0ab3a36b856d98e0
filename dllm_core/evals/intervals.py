"""Distribution-free 95 % intervals for few, noisy timings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

LEVEL = 0.95
# 97.5 % quantiles of Student's t with 1..4 degrees of freedom
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764)


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval.

    Attributes:
        value: the estimate.
        low: lower end; None with a single value.
        high: upper end; None with a single value.
        assumes_normal: too few values (under 6) for an interval that assumes nothing: Student's t was used.
    """

    value: float
    low: float | None
    high: float | None
    assumes_normal: bool = False

    def as_list(self) -> list[float | None]:
        """Return [low, high]."""
        return [self.low, self.high]


def median_interval(values: Sequence[float]) -> Interval:
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
        if 2 * tail > 1 - LEVEL:
            break
        cut += 1
    if cut < 0:
        return _student(ordered, median(ordered))
    return Interval(median(ordered), ordered[cut], ordered[n - 1 - cut])


def _student(values: Sequence[float], centre: float) -> Interval:
    n = len(values)
    if n < 2:
        return Interval(centre, None, None, assumes_normal=True)
    assert n <= len(_STUDENT) + 1, "more values than this have an interval of their own"
    half = _STUDENT[n - 2] * stdev(values) / math.sqrt(n)
    middle = mean(values)
    return Interval(centre, min(centre, middle - half), max(centre, middle + half), assumes_normal=True)


def _signed_rank_cut(n: int) -> int:
    """Return the largest w with P(W <= w) <= (1 - LEVEL) / 2 for Wilcoxon's signed-rank statistic, or -1."""
    top = n * (n + 1) // 2
    ways = [1] + [0] * top
    for rank in range(1, n + 1):
        for total in range(top, rank - 1, -1):
            ways[total] += ways[total - rank]
    # integers throughout: the 2^n sign patterns are counted exactly
    limit = (1 - LEVEL) / 2 * 2**n
    cumulated = 0
    for w in range(top + 1):
        cumulated += ways[w]
        if cumulated > limit:
            return w - 1
    return top


def centre_interval(values: Sequence[float]) -> Interval:
    """Return the Hodges-Lehmann centre and its signed-rank interval: exact if the values are symmetric about it.

    Logarithms of paired timing ratios are: swapping two rows of equal speed flips the sign and changes nothing else.
    Narrower than the median's interval and as deaf to an outlier. Below 6 values it is Student's interval of the mean.
    """
    n = len(values)
    walsh = sorted((values[i] + values[j]) / 2 for i in range(n) for j in range(i, n))
    cut = _signed_rank_cut(n)
    if cut < 0:
        return _student(values, median(walsh))
    return Interval(median(walsh), walsh[cut], walsh[len(walsh) - 1 - cut])
