"""Server momentum (FedAvgM)."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregation.interfaces import ServerOpt
from molehill_server.aggregation.moments import checked, moment
from molehill_server.records import State


@dataclass(frozen=True)
class MomentumParams:
    """Parameters of `Momentum`.

    Attributes:
        lr: Server learning rate.
        beta: How much of the last step is repeated.
    """

    lr: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        checked(lr=self.lr, beta=self.beta)


@register(
    "server_opt",
    "momentum",
    params=MomentumParams,
    paper="Hsu et al. 2019, FedAvgM",
    url="https://arxiv.org/abs/1909.06335",
)
class Momentum(ServerOpt):
    """``m <- beta m + change``, ``theta <- theta + lr m``."""

    def __init__(self, params: MomentumParams) -> None:
        self._params = params

    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """One step on the touched keys."""
        out, m = old.copy(), moment(state, "m", old.layout, 0.0)
        for key in touched:
            m[key][...] = self._params.beta * m[key] + (new[key] - old[key])
            out[key][...] += self._params.lr * m[key]
        return out, {**state, "m": m}
