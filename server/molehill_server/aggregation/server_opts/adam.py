"""Adam on the server (FedAdam)."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Tree
from molehill_server.aggregation.moments import adapt, checked
from molehill_server.records import State


@dataclass(frozen=True)
class AdamParams:
    """Parameters of `Adam`.

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
    "adam",
    params=AdamParams,
    paper="Reddi et al. 2021, FedAdam",
    url="https://arxiv.org/abs/2003.00295",
)
class Adam:
    """Steps divided by the running size of the changes: ``v <- beta2 v + (1 - beta2) change^2``."""

    stateful = True

    def __init__(self, params: AdamParams) -> None:
        self._params = params

    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """One step on the touched keys."""
        p = self._params
        return adapt(old, new, touched, state, lr=p.lr, beta1=p.beta1, tau=p.tau, second=self._second)

    def _second(self, v: Array, square: Array) -> Array:
        beta2 = self._params.beta2
        return beta2 * v + (1 - beta2) * square
