"""No lowering: the space already ends in factors."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.aggregation.interfaces import Combined, Lower
from molehill_server.records import AggOut, Global


@register("lower", "none", paper="house")
class NoLower(Lower):
    """Takes the averaged factors as they are."""

    needs_products = False
    fixed_gauge = True

    def lower(self, combined: Combined, _glob: Global, _seed: int, /) -> AggOut:
        """The means of the factors."""
        return AggOut(combined.tree)
