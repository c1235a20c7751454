"""Which experts an owner leans on and trains, decided from what its changes say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Array, Layout, Tree


@dataclass(frozen=True)
class Leaning:
    """What of the experts is a client's.

    Attributes:
        bias: Added to the logits of its router, by expert id; experts that are not named get 0.
        trains: The routed experts it trains and sends; None for all.
    """

    bias: Mapping[str, float] = field(default_factory=dict)
    trains: frozenset[str] | None = None


@dataclass(frozen=True)
class Seen:
    """What an assignment may look at.

    Attributes:
        round: The round that was just done.
        rounds: Of the run.
        changes: By client, the sum of its changes so far of the tensors that the assignment wants, in their order.
        rows: What each of them counts for.
        known: What was decided before, by client.
        experts: Ids of the routed experts.
        seed: Of the run.
    """

    round: int
    rounds: int
    changes: Mapping[str, Tree]
    rows: Mapping[str, int]
    known: Mapping[str, Leaning]
    experts: Sequence[str]
    seed: int = 0


class Assignment(ABC):
    """Decides after a round what of the experts is whose; one object serves one call, what lasts is in `Seen`.

    Attributes:
        sees: Kinds of tensors (see `molehill.wire.keys.Key.kind`) of whose changes it wants the sum of every client,
            the first of them that clients send; empty for an assignment that decides nothing.
        leans: It gives biases, which need a scorer that takes them.
    """

    sees: tuple[str, ...] = ()
    leans: bool = False

    @abstractmethod
    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """What is decided from now on, by client; who is not named has all experts and no bias."""


def routed(keys: Iterable[Key]) -> list[str]:
    """Ids of the routed experts, in their order."""
    found = {key.expert for key in keys if key.expert != NO_EXPERT and not key.expert.startswith("shared")}
    return sorted(found, key=lambda expert: (len(expert), expert))


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
