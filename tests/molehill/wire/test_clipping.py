from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehill.errors import MessageError
from molehill.wire.clipping import clip, norm
from molehill.wire.keys import Key
from molehill.wire.tree import Tree

KEY = Key("head", "-", "head.bias")


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_no_norm_is_above_the_bound_and_no_direction_changes(values, bound):
    tree = Tree.of({KEY: np.array(values, np.float32)})
    clipped = clip(tree, bound)
    assert norm(clipped.flat) <= bound
    if norm(tree.flat) <= bound:
        assert clipped is tree
    else:
        assert norm(clipped.flat) == pytest.approx(bound, rel=1e-5)
        np.testing.assert_allclose(clipped.flat, tree.flat * (bound / norm(tree.flat)), rtol=1e-4, atol=1e-6 * bound)


def test_the_norm_of_a_long_vector_is_summed_in_parts():
    flat = np.full(200_001, 0.1, np.float32)
    assert norm(flat) == pytest.approx(float(np.linalg.norm(flat.astype(np.float64))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_cannot_be_clipped(value):
    with pytest.raises(MessageError, match="finite"):
        clip(Tree.of({KEY: np.array([1.0, value])}), 1.0)
