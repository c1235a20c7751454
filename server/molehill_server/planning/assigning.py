"""Which experts an owner leans on and trains, decided from what its changes say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molehill.wire.keys import NO_EXPERT, OWN_PLACES, Key
from molehill.wire.tree import Array, Layout, Tree


@dataclass(frozen=True)
class Leaning:
    """What of the experts is a client's.

    Attributes:
        bias: What its router's own part says of experts, by expert id; experts that are not named get 0.
        trains: The routed experts it trains and sends; None for all.
        apart: It trains them, and a head, by itself: from the start values and what it kept, without routers. What it
            sends, its whole change since the start, is looked at and not merged.
    """

    bias: Mapping[str, float] = field(default_factory=dict)
    trains: frozenset[str] | None = None
    apart: bool = False


@dataclass(frozen=True)
class Seen:
    """What an assignment may look at.

    Attributes:
        round: The round that was just done; 0 before the first.
        rounds: Of the run.
        changes: By client, the sum of its changes so far of the tensors that the assignment wants, in their order. Of
            an assignment that forms experts: the changes since the start of all that clients apart send, until it is
            decided what is theirs; and of one that gathers, under `molehill.wire.keys.OWN_PLACES`, the places that
            they told. Of one that asks: the embeddings that it told last, see `embedded`.
        rows: Training rows of every client that ever came.
        known: What was decided before, by client.
        experts: Ids of the routed experts.
        seed: Of the run.
        model: The shared model after the round.
    """

    round: int
    rounds: int
    changes: Mapping[str, Tree]
    rows: Mapping[str, int]
    known: Mapping[str, Leaning]
    experts: Sequence[str]
    seed: int = 0
    model: Tree = field(default_factory=lambda: Tree(Layout({})))


class Assignment(ABC):
    """Decides after a round what of the experts is whose; one object serves one call, what lasts is in `Seen`.

    Attributes:
        sees: Kinds of tensors (see `molehill.wire.keys.Key.kind`) of whose changes it wants the sum of every client,
            the first of them that clients send; empty for an assignment that decides nothing.
        asks: It goes by what clients tell of their embeddings, which need a scorer that has them.
        leans: It gives biases, which need a scorer that takes them.
        lean_means: What they are; as of `molehill.molora.interfaces.Scorer`.
        forms: Clients train apart until it is decided what is theirs, and the experts are then formed from that.
        gathers: It goes by where clients' rows lie, which those that train apart tell; it needs a scorer that `Settles`
            (`molehill.molora.interfaces`). It forms experts, and their places.
        crosses: Of several experts of a client apart it forms those of other ids, so all need the same start values.
        warmup: Of a built one: the round after which it decides for the first time.
        least: Of a built one: how many routed experts it cannot do without.
    """

    sees: tuple[str, ...] = ()
    asks: bool = False
    leans: bool = False
    lean_means: Literal["bias", "place"] = "bias"
    forms: bool = False
    gathers: bool = False
    crosses: bool = False
    warmup: int = 0
    least: int = 1

    @abstractmethod
    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """What is decided from now on, by client; who is not named is a newcomer."""

    def newcomer(self, _experts: Sequence[str]) -> Leaning | None:
        """What is a client's of which nothing is decided; None for all experts and no bias."""
        return None

    def form(self, _seen: Seen, _found: Mapping[str, Leaning]) -> Mapping[Key, Array]:
        """Values of the shared model that follow from what was seen, now that ``found`` is decided."""
        return {}


def routed(keys: Iterable[Key]) -> list[str]:
    """Ids of the routed experts, in their order."""
    found = {key.expert for key in keys if key.routed}
    return sorted(found, key=lambda expert: (len(expert), expert))


def embedded(told: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str]) -> Tree:
    """What a client told of its embeddings as a tree of one shape for all clients.

    Every router has ``[1 + E, r]``, the tokens first; zeros for experts that it told nothing of.
    """
    found = {}
    for site, rows in told.items():
        rank = len(rows[NO_EXPERT])
        values = [rows.get(expert, [0.0] * rank) for expert in (NO_EXPERT, *experts)]
        found[Key(site, NO_EXPERT, "gate.embeddings")] = np.array(values, np.float32)
    return Tree.of(found)


def placed(told: Mapping[str, Sequence[Sequence[float]]]) -> Tree:
    """Where a client told that its rows lie, ``[n, w]`` for every router."""
    return Tree.of({Key(site, NO_EXPERT, OWN_PLACES): np.array(rows, np.float32) for site, rows in told.items()})


def added(before: Tree | None, change: Mapping[Key, Array], layout: Layout) -> Tree:
    """The sum of a client's changes, one more of which came; what it does not hold counts as 0."""
    total = Tree(layout) if before is None else before.copy()
    for key, value in total.items():
        if key in change:
            value[tuple(map(slice, change[key].shape))] += change[key]
    return total


def directions(changes: Mapping[str, Tree]) -> tuple[list[str], NDArray[np.float64]]:
    """Clients, and of each its changes at length 1, ``[K, P]``; zeros for one that changed nothing."""
    clients = sorted(changes)
    flat = np.stack([changes[client].flat for client in clients]).astype(np.float64)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return clients, flat / np.where(length > 0, length, 1.0)
