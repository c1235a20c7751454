"""Adagrad on the server (FedAdagrad)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregation.interfaces import ServerOpt
from molehill_server.aggregation.moments import adapt, checked
from molehill_server.records import State


@dataclass(frozen=True)
class AdagradParams:
    """Parameters of `Adagrad`.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the mean of changes.
        tau: Degree of adaptivity; small is strong.
    """

    lr: float = 1e-3
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        checked(lr=self.lr, beta=self.beta1, tau=self.tau)


@register(
    "server_opt",
    "adagrad",
    params=AdagradParams,
    paper="Reddi et al. 2021, FedAdagrad",
    url="https://arxiv.org/abs/2003.00295",
)
class Adagrad(ServerOpt):
    """Steps divided by the size of all changes so far: ``v <- v + change^2``."""

    def __init__(self, params: AdagradParams) -> None:
        self._params = params

    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """One step on the touched keys."""
        p = self._params
        return adapt(old, new, touched, state, lr=p.lr, beta1=p.beta1, tau=p.tau, second=np.add)
