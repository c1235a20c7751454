"""Factor space: A and B are averaged on their own (FedIT)."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.aggregation.interfaces import Space
from molehill_server.aggregation.sums import FactorSum
from molehill_server.records import Global


@register("space", "factor", paper="Zhang et al. 2023, FedIT", url="https://arxiv.org/abs/2305.05644")
class Factor(Space):
    """Averages A and B separately, one update in memory at a time.

    The product of the means is not the mean of the products: it lacks ``sum_k p_k (B_k - B)(A_k - A)``, which is zero
    only when the clients have one factor in common.
    """

    closed = True

    def start(self, glob: Global, /) -> FactorSum:
        """An empty mean."""
        return FactorSum(glob)
