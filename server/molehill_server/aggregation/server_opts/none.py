"""The mean as it is."""

from __future__ import annotations

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregation.interfaces import ServerOpt
from molehill_server.records import State


@register("server_opt", "none", paper="McMahan et al. 2017, FedAvg", url="https://arxiv.org/abs/1602.05629")
class NoOpt(ServerOpt):
    """Takes the combined model as the next one."""

    stateful = False
    moves = False

    def apply(self, _old: Tree, new: Tree, _touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """The combined model."""
        return new, state
