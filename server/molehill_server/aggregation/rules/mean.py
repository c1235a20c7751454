"""The mean weighted by examples and by tokens routed."""

from __future__ import annotations

from collections.abc import Sequence

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.shares import shares
from molehill_server.records import Global, Update


@register("rule", "mean", paper="McMahan et al. 2017, FedAvg", url="https://arxiv.org/abs/1602.05629", seeds=("S127",))
class Mean(WeightRule):
    """Weights by examples, per expert times the fraction of the client's tokens routed to it.

    Client k counts ``n_k u_ke`` for expert e, with ``u_ke`` its fraction of gate mass at that site; for a plain LoRA
    that is FedAvg. An expert that received no token anywhere keeps its old value.
    """

    sums = True

    def weights(self, updates: Sequence[Update], _glob: Global, /) -> list[Weight]:
        """Weights of the updates, see the class."""
        return [
            Weight(update.examples, {pair: update.examples * share for pair, share in shares(update).items()})
            for update in updates
        ]
