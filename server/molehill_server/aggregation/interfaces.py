"""The interfaces of the four parts of an aggregation, and what they hand to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Array, Tree
from molehill_server.records import AggOut, Global, LowRank, Pair, State, Update


@dataclass(frozen=True)
class Weight:
    """How much one update counts, before division by the sum over updates.

    Attributes:
        rest: Weight of tensors that belong to no expert (router, head).
        experts: Weight of every (site, expert) the update holds; 0 where it has nothing to say.
    """

    rest: float
    experts: Mapping[Pair, float]

    def of(self, key: Key) -> float:
        """The weight of one tensor."""
        return self.rest if key.expert == NO_EXPERT else self.experts[key.site, key.expert]


@dataclass(frozen=True)
class Combined:
    """The weighted mean of a round in the terms of its space.

    Attributes:
        tree: Means of the factors and of all other tensors; what nobody sent, or sent with weight 0, is the old value
            bit for bit.
        touched: Keys of ``tree`` that took part in a mean.
        products: The mean of the products ``B A`` of every touched pair; empty in spaces without products.
        tails: Frobenius norm of what a product of ``products`` lacks, by pair, for rules whose result has full rank;
            at right angles to the product.
    """

    tree: Tree
    touched: frozenset[Key]
    products: Mapping[Pair, LowRank] = field(default_factory=dict)
    tails: Mapping[Pair, float] = field(default_factory=dict)


class WeightRule(ABC):
    """Gives every update one number per expert.

    Attributes:
        additive: An update's weight does not depend on the others, so updates can be taken one at a time.
        sums: The result needs nothing of an update but its part in a sum whose weights its numbers do not change: so
            it can be had of masked updates, and noise of a bounded size hides one client.
        needs_products: It judges products ``B A``, so the space must combine them.
        needs_pairs: It weighs an expert by both of its factors, so both must be sent.
    """

    additive: bool = True
    sums: bool = False
    needs_products: bool = False
    needs_pairs: bool = False

    @property
    def least(self) -> int:
        """Fewest updates that it can judge; an expert that fewer clients used keeps its value."""
        return 1

    @abstractmethod
    def weights(self, updates: Sequence[Update], glob: Global, /) -> Sequence[Weight]:
        """The weight of each of ``updates``: one update when additive, else all of the round."""


@runtime_checkable
class CoordRule(Protocol):
    """A rule that works number by number; its weights only say who takes part."""

    @property
    def least(self) -> int: ...  # noqa: D102 - see `WeightRule`

    def merge(self, stack: Array, /) -> Array:
        """From ``[K, ...]`` of at least ``least`` clients to ``[...]``; the order of the clients does not matter."""
        ...


@runtime_checkable
class CensusRule(Protocol):
    """A rule that judges every expert among all clients of the round, not only among those that used it.

    Attributes:
        unused_votes: A client that did not use an expert votes for its old value; see
            `molehill_server.aggregation.robust.ballots`.
    """

    unused_votes: Literal[True]


class Sum(Protocol):
    """A running combination."""

    def add(self, update: Update, weight: Weight) -> None:
        """Take in one update."""
        ...

    def finish(self) -> Combined:
        """The weighted mean of what was added."""
        ...


class Space(ABC):
    """What is combined.

    Attributes:
        products: The combination includes the products ``B A``.
        closed: The combination is a pair of factors again, so nothing needs lowering.
        folds: The rank of its products does not grow with the number of clients.
        common: The factor that must be the same on all clients, or ``either`` of them; empty for none.
    """

    products: bool = False
    closed: bool = False
    folds: bool = False
    common: Literal["A", "B", "either", ""] = ""

    @abstractmethod
    def start(self, glob: Global, /) -> Sum:
        """An empty combination for this round."""


class Lower(ABC):
    """Brings combined products back to factors of the shared rank.

    Attributes:
        needs_products: It reads ``Combined.products``, and makes both factors anew.
        tails: It takes products of full rank, of which ``Combined.tails`` says what they lack.
        fixed_gauge: The new factors continue the old ones, so a server optimiser may compare them; False when they
            are factored anew, since (B G, G^-1 A) is the same product for every G.
        patches: What the new factors cannot hold goes into patches, which are right for these factors only.
        restarts: The experts start anew in every round.
    """

    needs_products: bool = True
    tails: bool = False
    fixed_gauge: bool = False
    patches: bool = False
    restarts: bool = False

    @abstractmethod
    def lower(self, combined: Combined, glob: Global, seed: int, /) -> AggOut:
        """New shared tensors, and patches for what they cannot hold. ``seed`` is the run's."""


class ServerOpt(ABC):
    """Treats the change of the mean as a gradient.

    Attributes:
        stateful: It keeps tensors from round to round.
        moves: The next model may be another than the mean.
    """

    stateful: bool = True
    moves: bool = True

    @abstractmethod
    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """The next model and the next state; neither argument is changed.

        Keys outside ``touched`` keep their old value and state, so that momentum does not move an expert that no
        client trained.
        """
