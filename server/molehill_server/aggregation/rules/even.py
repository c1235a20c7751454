"""Every client counts the same."""

from __future__ import annotations

from collections.abc import Sequence

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.shares import shares
from molehill_server.records import Global, Update


@register("rule", "even", paper="house: the unweighted mean of many published methods")
class Even(WeightRule):
    """Every client counts 1, whatever its rows and tokens; an expert it routed no token to has nothing to say."""

    def weights(self, updates: Sequence[Update], _glob: Global, /) -> list[Weight]:
        """Weights of the updates, see the class."""
        return [Weight(1.0, {pair: float(share > 0) for pair, share in shares(update).items()}) for update in updates]
