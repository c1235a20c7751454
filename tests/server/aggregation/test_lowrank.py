"""Low-rank arithmetic against dense numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill_server.aggregation import lowrank
from molehill_server.records import LowRank


def point(seed, d_out, d_in, rank):
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(d_out, rank)).astype(np.float32), rng.normal(size=(rank, d_in)).astype(np.float32))


def dense(p):
    return p.B.astype(np.float64) @ p.A


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))


@given(SIZES, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_svd_is_the_dense_svd_at_any_rank(size, seed):
    d_out, d_in, rank = size
    p = point(seed, d_out, d_in, rank)
    u, s, v = lowrank.svd(p)
    n = min(size)
    assert u.shape == (d_out, n)
    assert v.shape == (n, d_in)
    np.testing.assert_allclose(s, np.linalg.svd(dense(p), compute_uv=False)[:n], atol=1e-9)
    np.testing.assert_allclose((u * s) @ v, dense(p), atol=1e-9)
    np.testing.assert_allclose(v @ v.T, np.eye(n), atol=1e-9)


@given(SIZES, st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_inner_norm_and_distance_are_those_of_the_products(size, other, seed):
    d_out, d_in, rank = size
    p, q = point(seed, d_out, d_in, rank), point(seed + 1, d_out, d_in, other)
    assert lowrank.inner(p, q) == pytest.approx(np.sum(dense(p) * dense(q)), abs=1e-8)
    assert lowrank.norm(p) == pytest.approx(np.linalg.norm(dense(p)))
    assert lowrank.distance(p, q) == pytest.approx(np.linalg.norm(dense(p) - dense(q)), abs=1e-6)


def test_svd_signs_do_not_depend_on_the_order_of_the_columns():
    p = point(0, 8, 7, 4)
    order = [2, 0, 3, 1]
    _, _, v = lowrank.svd(p)
    _, _, again = lowrank.svd(LowRank(p.B[:, order], p.A[order]))
    np.testing.assert_allclose(v, again, atol=1e-9)


def test_compress_drops_columns_the_product_does_not_need():
    p = point(0, 8, 7, 2)
    doubled = lowrank.concat([p, p, p], [0.5, 0.25, 1.0])
    small = lowrank.compress(doubled)
    assert small.rank == 2
    np.testing.assert_allclose(dense(small), 1.75 * dense(p), atol=1e-5)
    assert lowrank.norm(lowrank.compress(lowrank.concat([p, p], [1.0, -1.0]))) < 1e-12
    assert lowrank.compress(LowRank(p.B * 0, p.A)).rank == 0


def test_fold_bounds_the_rank_and_keeps_smaller_points_as_they_are():
    wide = point(1, 5, 6, 40)
    assert lowrank.fold(wide).rank == 5
    np.testing.assert_allclose(dense(lowrank.fold(wide)), dense(wide), atol=2e-5)
    narrow = point(1, 5, 6, 5)
    assert lowrank.fold(narrow) is narrow


def test_concat_with_unit_weights_copies_bits():
    p, q = point(1, 5, 6, 2), point(2, 5, 6, 3)
    both = lowrank.concat([p, q])
    assert np.array_equal(both.A, np.vstack([p.A, q.A]))
    assert np.array_equal(both.B, np.hstack([p.B, q.B]))
