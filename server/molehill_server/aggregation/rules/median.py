"""The median of each number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from molehill.registry import register
from molehill.wire.tree import Array
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.robust import equal_weights
from molehill_server.records import Global, Update


@register(
    "rule",
    "median",
    paper="Yin et al. 2018, Byzantine-Robust Distributed Learning",
    url="https://arxiv.org/abs/1803.01498",
)
class Median(WeightRule):
    """Takes the median of every number of the product.

    While fewer than half of the round's clients lie, each number of the merged product lies between those of honest
    clients, at every expert: a client that did not use an expert votes for its old value, and an expert that no more
    than half of the clients used keeps its value. No more is promised: where honest clients stand apart, liars near
    half can pick the end of their range, round after round.

    The products of the experts are merged, never their factors; the result is brought back to factors by lower
    ``svd``. Clients count alike: by examples, the largest client could be the median alone.
    """

    additive = False
    needs_products = True
    unused_votes: Literal[True] = True
    least = 3  # of two, neither is outvoted

    def weights(self, updates: Sequence[Update], _glob: Global, /) -> list[Weight]:
        """Who takes part."""
        return equal_weights(updates)

    def merge(self, stack: Array, /) -> Array:
        """The median over the first axis; the mean of the middle two for an even number."""
        merged: Array = np.median(stack, axis=0).astype(np.float32)
        return merged
