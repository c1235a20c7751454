"""Experts made of what owners learnt alone, one for each cluster of owners (FedLEASE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from molehill.registry import register
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Tree
from molehill_server.planning.assigning import Assignment, Leaning, Seen, directions
from molehill_server.planning.clustering import clusters, distances

_OWN, _OPEN = 2.0, 1.0  # see `molehill.molora.interfaces.Scorer.lean_means`


@dataclass(frozen=True)
class LeaseParams:
    """Parameters of `Lease`.

    Attributes:
        warmup: Rounds in which every client trains a LoRA by itself.
        most: Most clusters; not more than there are experts.
    """

    warmup: Annotated[int, Field(ge=1)] = 5
    most: Annotated[int, Field(ge=2)] = 4


@register(
    "assignment",
    "lease",
    params=LeaseParams,
    paper="Wang et al. 2025, Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning (FedLEASE)",
    url="https://arxiv.org/abs/2510.26165",
)
class Lease(Assignment):
    """FedLEASE: clients train a LoRA each, clusters of them make experts, and each trains its cluster's on.

    In the warm-up nothing is merged. Then clients are clustered by 1 - cosine of their B, averaged over the adapted
    modules (average linkage, 2 to ``most`` clusters by the best mean silhouette). The mean over a cluster is its
    expert. From then on a client trains and sends its own expert and its cluster's router alone, so that both are
    averaged over the cluster, and has the others' experts as they are.

    Differs from the paper: all clients start from the same A, without which B could not be compared; no division into
    clusters is made where none has a silhouette above 0 (the paper always makes two or more); a client that comes
    later trains alone for a round and joins the expert whose B is nearest to its own. Experts that no cluster has are
    the mean over all clients, for the shared model's sake, and closed to all. A head that is shared is the mean over
    all clients after the warm-up; set ``personal.head = "personal"`` for the paper's, where each has a task of its own.
    """

    sees = ("B",)
    leans = True
    lean_means = "place"
    forms = True

    def __init__(self, params: LeaseParams) -> None:
        self.params, self.warmup = params, params.warmup

    def newcomer(self, experts: Sequence[str]) -> Leaning:
        """One LoRA, by itself."""
        return Leaning({experts[0]: _OWN}, frozenset(experts[:1]), apart=True)

    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """Decide after the warm-up, and for clients that came since."""
        new = sorted(client for client in seen.changes if client not in seen.known)
        if seen.round < self.params.warmup or not new:
            return seen.known
        B = [{key: value for key, value in seen.changes[client].items() if key.kind == "B"} for client in new]
        if not seen.known:
            labels, _ = clusters(_apart(B), min(self.params.most, len(seen.experts)))
            live = seen.experts[: int(labels.max()) + 1]
            return {client: _own(live, live[label]) for client, label in zip(new, labels.tolist(), strict=True)}
        live = [expert for expert in seen.experts if any(expert in each.bias for each in seen.known.values())]
        names = [key for key in B[0] if all(key._replace(expert=expert) in seen.model for expert in live)]
        theirs = [{key: seen.model[key._replace(expert=expert)] for key in names} for expert in live]
        apart = _apart([*theirs, *B])[len(live) :, : len(live)]
        near = {client: _own(live, live[int(np.argmin(row))]) for client, row in zip(new, apart, strict=True)}
        return {**seen.known, **near}

    def form(self, seen: Seen, found: Mapping[str, Leaning]) -> Mapping[Key, Array]:
        """The means over clusters, once; and over all of what belongs to no routed expert."""
        if seen.known or not found:
            return {}
        first = seen.experts[0]
        formed: dict[Key, Array] = {}
        for expert in seen.experts:
            members = [client for client, leaning in found.items() if leaning.trains == frozenset({expert})] or list(
                found
            )
            for key, value in seen.model.items():
                name = key._replace(expert=expert)
                if key.expert == first and name in seen.model:  # deeper layers may have more experts than others
                    formed[name] = value + _mean(seen.changes, members, key)
        rest = [key for key in next(iter(seen.changes.values())) if key.expert != first]
        return formed | {key: seen.model[key] + _mean(seen.changes, list(found), key) for key in rest}


def _own(live: Sequence[str], own: str) -> Leaning:
    return Leaning({expert: _OWN if expert == own else _OPEN for expert in live}, frozenset({own}))


def _mean(changes: Mapping[str, Tree], clients: Sequence[str], key: Key) -> Array | float:
    """The mean change of a tensor over clients; 0 where it is not sent."""
    found = [changes[client][key] for client in clients if key in changes[client]]
    return np.mean(found, axis=0, dtype=np.float32) if found else 0.0


def _apart(B: Sequence[Mapping[Key, Array]]) -> NDArray[np.float64]:
    """1 - cosine of every two clients' B, the mean over modules, ``[K, K]``."""
    each = []
    for key in B[0]:
        _, rays = directions({f"{n:09d}": Tree.of({key: one[key]}) for n, one in enumerate(B)})
        each.append(distances(rays))
    mean: NDArray[np.float64] = np.mean(each, axis=0)
    return mean
