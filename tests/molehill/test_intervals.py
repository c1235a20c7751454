"""Intervals against scipy's, and how often they hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from molehill.intervals import of_average, of_bounded, of_mean, of_share, standard_error


@pytest.mark.parametrize(("right", "n"), [(0, 5), (0, 7), (5, 5), (1, 3), (70, 100)])
def test_of_a_share_is_wilsons(right, n):
    low, high = binomtest(right, n).proportion_ci(method="wilson")
    assert of_share(right / n, n) == pytest.approx((low, high))
    assert 0 <= of_share(right / n, n)[0] <= right / n <= of_share(right / n, n)[1] <= 1


def test_of_bounded_values_is_wilsons_where_they_are_trials_and_narrower_where_they_vary_less():
    n, share = 50, 0.3
    trial = math.sqrt(share * (1 - share) / n)
    assert of_bounded(share, trial, n) == pytest.approx(of_share(share, n))
    low, high = of_bounded(share, trial / 2, n)
    assert of_share(share, n)[0] < low < share < high < of_share(share, n)[1]
    assert of_bounded(1.0, 0.0, n) == of_share(1.0, n)
    assert of_bounded(share, None, n) == of_share(share, n)


def test_of_a_mean():
    values = np.array([0.5, 1.5, 4.0, 2.0])
    error = standard_error(values.sum(), (values**2).sum(), 4)
    assert error == pytest.approx(values.std(ddof=1) / 2)
    assert of_mean(2.0, error)[1] == pytest.approx(2 + 1.959964 * error)
    assert of_mean(0.1, 1.0)[0] == 0
    assert standard_error(3.0, 9.0, 1) is None


def test_of_the_average_of_independent_figures():
    assert of_average([0.4], [(0.3, 0.6)]) == pytest.approx((0.3, 0.6))
    assert of_average([0.4] * 4, [(0.3, 0.6)] * 4) == pytest.approx((0.35, 0.5))
    assert of_average([0.0] * 3, [of_share(0.0, 7)] * 3)[0] == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(0)
    truth, held = np.array([0.9, 0.6, 0.75]), 0
    for _ in range(500):
        shares = rng.binomial(30, truth) / 30
        low, high = of_average(shares.tolist(), [of_share(share, 30) for share in shares])
        held += low <= truth.mean() <= high
    assert 0.92 <= held / 500 <= 0.98
