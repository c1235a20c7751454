"""Intervals that hold a figure with 95% confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Interval: TypeAlias = tuple[float, float]

_Z = 1.959963984540054  # quantile 0.975 of the normal distribution


def of_share(share: float, n: float) -> Interval:
    """Of a share of independent trials, after Wilson (1927).

    Args:
        share: In [0, 1].
        n: Trials, above 0; for trials that go together so many as would say as much.
    """
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    centre, scale = share + _Z**2 / (2 * n), 1 + _Z**2 / n
    # Rounding alone could leave the share out where it is 0 or 1.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def of_mean(mean: float, error: float, low: float = 0.0, high: float = math.inf) -> Interval:
    """Of a mean by the normal distribution, within what it can be.

    Args:
        mean: The mean.
        error: Its standard error.
        low: Lowest value.
        high: Highest value.
    """
    return max(low, mean - _Z * error), min(high, mean + _Z * error)


def of_bounded(mean: float, error: float | None, n: float) -> Interval:
    """Of a mean of values in [0, 1]: Wilson's of the number of trials that would leave as large an error.

    So it stays within [0, 1], and is no point where all values are 0 or all are 1 (Korn and Graubard 1998 do the same
    with another interval of shares).

    Args:
        mean: In [0, 1].
        error: Its standard error; None where it is not known.
        n: How many independent values there are, above 0.
    """
    return of_share(mean, mean * (1 - mean) / error**2 if error and 0 < mean < 1 else n)


def standard_error(total: float, squares: float, n: int) -> float | None:
    """Standard error of the mean of independent values; None of a single one, which says nothing of it.

    Args:
        total: Their sum.
        squares: The sum of their squares.
        n: How many.
    """
    if n < 2:
        return None
    return math.sqrt(max(0.0, squares / n - (total / n) ** 2) / (n - 1))


def of_paired(total: float, squares: float, n: int, step: float = 1.0, most: float = 1.0) -> Interval:
    """Of the mean of independent differences of pairs, after Bonett and Price (2012).

    Their interval is of two shares of the same trials, whose differences are -1, 0 or 1: two more are counted, one of
    each sign. So it is no point where no pair differs.

    Args:
        total: Sum of the differences.
        squares: Sum of their squares.
        n: How many there are, above 0.
        step: The least that one can be beside 0.
        most: The most that the mean can be.
    """
    mean, middle = total / n, total / (n + 2)
    spread = max(0.0, (squares + 2 * step**2) / (n + 2) - middle**2)
    error = _Z * math.sqrt(spread / (n + 2))
    # Rounding alone could leave the mean out.
    return max(-most, min(mean, middle - error)), min(most, max(mean, middle + error))


def student(n: int) -> float:
    """How many times as long an interval of ``n`` values is by Student's t as by the normal distribution, for 95%.

    Args:
        n: At least 2. The expansion of Abramowitz and Stegun (1964, 26.7.5) is right to a percent from 4 on.
    """
    z, few = _Z, float(n - 1)
    terms = (z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96, (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384
    return 1 + sum(term / few**power for power, term in enumerate(terms, 1))


def of_average(figures: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Of the unweighted mean of independent figures from the interval of each (MOVER, Zou and Donner 2008).

    Args:
        figures: At least one.
        intervals: One for each.
    """
    n, mean = len(figures), sum(figures) / len(figures)
    below = math.sqrt(sum((figure - low) ** 2 for figure, (low, _) in zip(figures, intervals, strict=True)))
    above = math.sqrt(sum((high - figure) ** 2 for figure, (_, high) in zip(figures, intervals, strict=True)))
    # Rounding alone could leave what all of them are within.
    return max(mean - below / n, min(low for low, _ in intervals)), min(
        mean + above / n, max(high for _, high in intervals)
    )


def of_correlation(r: float, n: int, spread: float = 0.0) -> Interval | None:
    """Of a correlation by Fisher's transformation; None of too few pairs to say anything.

    Args:
        r: In [-1, 1].
        n: Pairs.
        spread: 0 for Pearson's; 0.5 for Spearman's, whose variance grows with r (Bonett and Wright 2000).
    """
    if n < 5:
        return None
    if abs(r) >= 1:
        return r, r
    error = _Z * math.sqrt((1 + spread * r**2) / (n - 3))
    return math.tanh(math.atanh(r) - error), math.tanh(math.atanh(r) + error)
