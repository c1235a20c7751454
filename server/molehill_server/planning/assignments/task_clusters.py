"""Experts of tasks: clusters of the clusters that clients find among their own rows (FedRouter)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from molehill.kmeans import kmeans, nearest
from molehill.registry import register
from molehill.wire.keys import OWN_PLACES, PLACES, Key
from molehill.wire.tree import Array, Tree
from molehill_server.planning.assigning import Assignment, Leaning, Seen

_OWN, _OPEN, _SHUT = 2.0, 1.0, 0.0  # see `molehill.molora.interfaces.Scorer.lean_means`


@dataclass(frozen=True)
class TaskClustersParams:
    """Parameters of `TaskClusters`.

    Attributes:
        local: Clusters of every client's rows, and adapters that it trains at first; not more than there are experts.
        warmup: Rounds in which every client trains these by itself.
        among: Whose experts a client's row may go to where nothing is trained: the ``own``, or ``all``.
    """

    local: Annotated[int, Field(ge=1)] = 2
    warmup: Annotated[int, Field(ge=1)] = 1
    among: Literal["own", "all"] = "own"


class _Part(NamedTuple):
    """A cluster of a client's rows.

    Attributes:
        client: Whose.
        number: Which, from 0.
        centre: By site, one after another.
    """

    client: str
    number: int
    centre: NDArray[np.float64]


@register(
    "assignment",
    "task_clusters",
    params=TaskClustersParams,
    paper="Talasso et al. 2026, Task-Centric Personalized Federated Fine-Tuning of Language Models (FedRouter)",
    url="https://arxiv.org/abs/2604.00050",
)
class TaskClusters(Assignment):
    """Experts belong to tasks and not to clients: every client trains those that its rows' clusters are nearest to.

    In the warm-up a client clusters its rows and trains an adapter for each cluster, on the cluster's rows alone. It
    tells the centres. The server clusters the centres of all clients by k-means, with as many clusters as there are
    experts; an expert is the mean of the adapters of its cluster, by rows of their clients, and its centroid that of
    the centres. From then on a client trains and sends the experts whose centroids are nearest to its centres. Rows
    that it answers go to the nearest centroid of these, or of all (``among``).

    Differs from the paper: a client trains all its clusters in every round, where the paper's code takes them in turn;
    after the warm-up an expert's mean counts a client's rows by how many of their tokens it got (rule ``mean``), where
    the code counts all rows of the client for whichever cluster it trained. k-means keeps the best of eight starts. A
    client that comes later trains alone for a round, then joins the experts of the nearest centroids. Where there are
    fewer different centres than experts, the others stay closed. A head that is shared is the mean over all clients.

    Adapters of one cluster may lie in slots of different ids at their clients, and a mean of factors is one of adapters
    only where these began with the same: `molora.init` is to be one whose start values are alike.
    """

    sees = ("B",)
    leans = True
    lean_means = "place"
    forms = True
    gathers = True
    crosses = True

    def __init__(self, params: TaskClustersParams) -> None:
        self.params, self.warmup, self.least = params, params.warmup, params.local

    def newcomer(self, experts: Sequence[str]) -> Leaning:
        """An adapter for every cluster, by itself."""
        own = experts[: self.params.local]
        return Leaning(dict.fromkeys(own, _OWN), frozenset(own), apart=True)

    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """Decide after the warm-up, and for clients that came since."""
        parts = [part for part in _parts(seen) if part.client not in seen.known]
        if seen.round < self.params.warmup or not parts:
            return seen.known
        centres = _centres(seen, parts)
        experts, others = seen.experts[: len(centres)], _OPEN if self.params.among == "all" else _SHUT
        theirs: dict[str, set[str]] = {}
        for part, at in zip(parts, _nearest(parts, centres), strict=True):
            theirs.setdefault(part.client, set()).add(experts[at])
        shut = dict.fromkeys(seen.experts, _SHUT) | dict.fromkeys(experts, others)
        found = {client: Leaning(shut | dict.fromkeys(own, _OWN), frozenset(own)) for client, own in theirs.items()}
        return {**seen.known, **found}

    def form(self, seen: Seen, found: Mapping[str, Leaning]) -> Mapping[Key, Array]:
        """The means over clusters, once; and over all clients of what belongs to no expert."""
        if seen.known or not found:
            return {}
        parts = _parts(seen)
        centres = _centres(seen, parts)
        formed: dict[Key, Array] = dict(_placed(seen.model, centres))
        at, clients = _nearest(parts, centres), list(found)
        for number, expert in enumerate(seen.experts[: len(centres)]):
            members = [part for part, where in zip(parts, at, strict=True) if where == number]
            weights = [seen.rows[part.client] for part in members]
            for key in (key for key in seen.model if key.expert == expert):
                own = [key._replace(expert=seen.experts[part.number]) for part in members]
                if all(name in seen.changes[part.client] for name, part in zip(own, members, strict=True)):
                    values = [
                        seen.model[name] + seen.changes[part.client][name]
                        for name, part in zip(own, members, strict=True)
                    ]
                    formed[key] = np.average(values, axis=0, weights=weights).astype(np.float32)
        weights = [seen.rows[client] for client in clients]
        for key in (key for key in seen.changes[clients[0]] if not key.routed and key.kind != "gate"):
            change = np.average([seen.changes[client][key] for client in clients], axis=0, weights=weights)
            formed[key] = (seen.model[key] + change).astype(np.float32)
        return formed


def _parts(seen: Seen) -> list[_Part]:
    """The clusters of all clients that told any, in a fixed order; a row of zeros is none."""
    found = []
    for client in sorted(seen.changes):
        told = [value for key, value in sorted(seen.changes[client].items()) if key.role == OWN_PLACES]
        rows = np.concatenate(told, axis=1).astype(np.float64) if told else np.zeros((0, 0))
        found += [_Part(client, number, row) for number, row in enumerate(rows) if row.any()]
    return found


def _centres(seen: Seen, parts: Sequence[_Part]) -> NDArray[np.float64]:
    """Centroids of the experts, ``[n, w]``: those that the model has, or else the clusters of the parts."""
    if seen.known:
        held = np.concatenate([seen.model[key] for key in sorted(seen.model) if key.role == PLACES], axis=1)
        return held[held.any(1)].astype(np.float64)
    return kmeans(np.stack([part.centre for part in parts]), len(seen.experts), seen.seed).astype(np.float64)


def _nearest(parts: Sequence[_Part], centres: NDArray[np.float64]) -> list[int]:
    at: list[int] = nearest(np.stack([part.centre for part in parts]), centres).tolist()
    return at


def _placed(model: Tree, centres: NDArray[np.float64]) -> Mapping[Key, Array]:
    """Centroids in the places of the model, site after site."""
    found, start = {}, 0
    for key in (key for key in sorted(model) if key.role == PLACES):
        value = np.zeros_like(model[key])
        value[: len(centres)] = centres[:, start : start + value.shape[1]]
        found[key], start = value, start + value.shape[1]
    return found
