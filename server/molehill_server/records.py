"""What the server holds and passes around between the steps of a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from molehill.wire.keys import NO_EXPERT
from molehill.wire.tree import Array, Tree

Pair: TypeAlias = tuple[str, str]  # (site, expert)
State: TypeAlias = Mapping[str, Tree | float]  # of a server optimiser


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix ``B A`` of shape ``[d_out, d_in]`` by its factors; the product is never formed.

    Attributes:
        B: ``[d_out, R]``, with every scale and weight absorbed.
        A: ``[R, d_in]``.
    """

    B: Array
    A: Array

    @property
    def rank(self) -> int:
        """R, the number of columns of B; the rank of the product is at most this."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True, eq=False)
class Update:
    """What one client sent, decoded.

    Attributes:
        client: Id of the client.
        tree: Values (not changes) of the tensors it shares. A client of lower rank sends the first rows of every A
            and the first columns of every B.
        examples: Rows it trains on.
        tokens: Gate mass by site and routed expert, in tokens. A site it does not name counts as evenly used.
    """

    client: str
    tree: Tree
    examples: int
    tokens: Mapping[Pair, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Global:
    """The shared model and everything a next round needs besides the base model.

    Attributes:
        tree: All tensors the server holds.
        patches: Frozen additions to single experts, gated as the expert is; they only ever grow.
        state: State of the server optimiser by name.
        round: Rounds done.
    """

    tree: Tree
    patches: Mapping[Pair, LowRank] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True, eq=False)
class AggOut:
    """What came back to factors at the end of an aggregation, before the server optimiser.

    Attributes:
        tree: The new shared tensors.
        patch: What to add to the patches of single experts.
        report: Scalars for the round's metrics.
    """

    tree: Tree
    patch: Mapping[Pair, LowRank] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)


def pairs(tree: Iterable[tuple[str, str, str]]) -> list[Pair]:
    """The LoRA pairs (site, expert) of which at least one factor is among the keys, sorted."""
    return sorted({(site, expert) for site, expert, role in tree if role in ("A", "B") and expert != NO_EXPERT})
