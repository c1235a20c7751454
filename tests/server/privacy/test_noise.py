"""The noise is Gaussian, and no two streams are alike."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from molehill_server.privacy.noise import Noise

KEY = bytes(range(32))


def test_it_is_standard_normal():
    draws = Noise(KEY).normal(400_000)
    assert draws.mean() == pytest.approx(0, abs=0.008)  # five standard errors
    assert draws.std() == pytest.approx(1, abs=0.006)
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert stats.kurtosis(draws) == pytest.approx(0, abs=0.05)
    assert 4 < np.abs(draws).max() < 6.5


def test_neighbours_are_independent():
    draws = Noise(KEY).normal(400_000)
    for lag in (1, 2, 4, 8, 100_000):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 0.01
        assert abs(np.corrcoef(draws[:-lag] ** 2, draws[lag:] ** 2)[0, 1]) < 0.01


def test_a_stream_goes_on_and_nobody_else_has_it():
    one, other = Noise(KEY), Noise(KEY)
    first = one.normal(5)
    assert np.array_equal(first, other.normal(5))
    assert not np.array_equal(first, one.normal(5))
    assert not np.array_equal(Noise().normal(5), Noise().normal(5))
