"""The median of each number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molehill.registry import register
from molehill.wire.tree import Array
from molehill_server.aggregation.interfaces import Weight
from molehill_server.aggregation.robust import equal_weights
from molehill_server.records import Global, Update


@register(
    "rule",
    "median",
    paper="Yin et al. 2018, Byzantine-Robust Distributed Learning",
    url="https://arxiv.org/abs/1803.01498",
)
class Median:
    """Takes the median of every number of the product; it holds while fewer than half of the clients are poisoned.

    The products of the experts are merged, never their factors; the result is brought back to factors by lower
    ``svd``. Clients count alike: by examples, the largest client could be the median alone.
    """

    additive = True
    needs_products = True
    least = 3  # of two, neither is outvoted

    def weights(self, updates: Sequence[Update], _glob: Global, /) -> list[Weight]:
        """Who takes part."""
        return equal_weights(updates)

    def merge(self, stack: Array, /) -> Array:
        """The median over the first axis; the mean of the middle two for an even number."""
        merged: Array = np.median(stack, axis=0).astype(np.float32)
        return merged
