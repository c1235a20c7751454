"""Adam on the server (FedAdam)."""

from __future__ import annotations

from molehill.registry import register
from molehill.wire.tree import Array
from molehill_server.aggregation.moments import Adaptive, AdaptiveParams


@register(
    "server_opt",
    "adam",
    params=AdaptiveParams,
    paper="Reddi et al. 2021, FedAdam",
    url="https://arxiv.org/abs/2003.00295",
)
class Adam(Adaptive):
    """Steps divided by the running size of the changes: ``v <- beta2 v + (1 - beta2) change^2``."""

    def second(self, v: Array, square: Array) -> Array:
        """Next v from v and the squared change."""
        return self._params.beta2 * v + (1 - self._params.beta2) * square
