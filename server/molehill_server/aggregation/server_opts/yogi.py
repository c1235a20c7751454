"""Yogi on the server (FedYogi)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Tree
from molehill_server.aggregation.moments import adapt, checked
from molehill_server.records import State


@dataclass(frozen=True)
class YogiParams:
    """Parameters of `Yogi`.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the mean of changes.
        beta2: Decay of the mean of squared changes.
        tau: Degree of adaptivity; small is strong.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        checked(lr=self.lr, beta=self.beta1, beta2=self.beta2, tau=self.tau)


@register(
    "server_opt",
    "yogi",
    params=YogiParams,
    paper="Reddi et al. 2021, FedYogi",
    url="https://arxiv.org/abs/2003.00295",
)
class Yogi:
    """Adam whose v moves by a bounded amount: ``v <- v - (1 - beta2) change^2 sign(v - change^2)``."""

    stateful = True

    def __init__(self, params: YogiParams) -> None:
        self._params = params

    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """One step on the touched keys."""
        p = self._params
        return adapt(old, new, touched, state, lr=p.lr, beta1=p.beta1, tau=p.tau, second=self._second)

    def _second(self, v: Array, square: Array) -> Array:
        step: Array = (1 - self._params.beta2) * square * np.sign(v - square)
        return v - step
