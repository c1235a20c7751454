"""Yogi on the server (FedYogi)."""

from __future__ import annotations

import numpy as np

from molehill.registry import register
from molehill.wire.tree import Array
from molehill_server.aggregation.moments import Adaptive, AdaptiveParams


@register(
    "server_opt",
    "yogi",
    params=AdaptiveParams,
    paper="Reddi et al. 2021, FedYogi",
    url="https://arxiv.org/abs/2003.00295",
)
class Yogi(Adaptive):
    """Adam whose v moves by a bounded amount: ``v <- v - (1 - beta2) change^2 sign(v - change^2)``."""

    def second(self, v: Array, square: Array) -> Array:
        """Next v from v and the squared change."""
        step: Array = (1 - self._params.beta2) * square * np.sign(v - square)
        return v - step
