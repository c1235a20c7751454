"""Rules that work number by number, on the products and not on their factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molehill.wire.keys import Key
from molehill.wire.tree import Array
from molehill_server.aggregation.interfaces import Combined, CoordRule, Weight
from molehill_server.aggregation.lowrank import approximate
from molehill_server.aggregation.sums import factors, require_fit
from molehill_server.records import Global, LowRank, Pair, Update, pairs

_CHUNK = 2**22  # numbers of all clients together that are merged at once


class CoordinateSum:
    """Merges the product ``B A`` of every pair, and every tensor that is no factor, number by number.

    The product of one expert is formed for some rows at a time and merged there; what is kept of the merged matrix,
    which has full rank, is its best approximation of the shared rank and a few columns more. So memory holds the
    clients' factors and one dense matrix of one expert.

    Args:
        glob: The model the round started from.
        rule: What becomes of the clients' numbers.
    """

    def __init__(self, glob: Global, rule: CoordRule) -> None:
        self._glob = glob
        self._rule = rule
        self._points: dict[Pair, list[LowRank]] = {}
        self._values: dict[Key, list[Array]] = {}

    def add(self, update: Update, weight: Weight) -> None:
        """Take in one update; it stays in memory until the end.

        Raises:
            MessageError: The update holds a tensor the model does not have, or a larger one.
        """
        for key, shape in update.tree.layout.items():
            require_fit(key, shape, self._glob.tree.layout, update.client)
            if weight.of(key) > 0 and key.role not in ("A", "B"):
                self._values.setdefault(key, []).append(update.tree[key])
        for pair in pairs(update.tree):
            if weight.experts[pair] > 0:
                self._points.setdefault(pair, []).append(factors(update.tree, self._glob.tree, pair))

    def finish(self) -> Combined:
        """What was merged; the factors in its tree are the old ones, since there is no merged factor."""
        tree, touched = self._glob.tree.copy(), set[Key]()
        products, tails = {}, {}
        for key, values in self._values.items():
            if len(values) >= self._rule.least:
                tree[key][...] = self._rule.merge(np.stack(values))
                touched.add(key)
        for pair, points in self._points.items():
            if len(points) >= self._rule.least:
                a, b = Key(*pair, "A"), Key(*pair, "B")
                products[pair], tails[pair] = approximate(self._merged(points), tree.layout[a][0])
                touched |= {a, b}
        return Combined(tree, frozenset(touched), products, tails)

    def _merged(self, points: Sequence[LowRank]) -> Array:
        d_out, d_in = points[0].shape
        merged = np.empty((d_out, d_in), np.float32)
        rows = max(1, _CHUNK // (len(points) * d_in))
        for start in range(0, d_out, rows):
            part = slice(start, start + rows)
            merged[part] = self._rule.merge(np.stack([point.B[part] @ point.A for point in points]))
        return merged
