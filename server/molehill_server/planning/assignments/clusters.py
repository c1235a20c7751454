"""Owners whose heads learn the same lean on the same experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from molehill.registry import register
from molehill_server.planning.assigning import Assignment, Leaning, Seen, directions
from molehill_server.planning.clustering import clusters, distances


@dataclass(frozen=True)
class ClustersParams:
    """Parameters of `Clusters`.

    Attributes:
        warmup: Rounds in which all experts are everybody's.
        bias: Added to the logits of a cluster's experts; at 4, one of four experts has 95% of the weight.
        least: Least mean silhouette; with less the owners are not told apart, and nobody leans.
    """

    warmup: Annotated[int, Field(ge=1)] = 2
    bias: Annotated[float, Field(gt=0, le=20)] = 4.0
    least: Annotated[float, Field(ge=0, le=1)] = 0.1


@register("assignment", "clusters", params=ClustersParams, paper="house")
class Clusters(Assignment):
    """Clusters of owners by the directions of their changes, once, after the warm-up.

    Average linkage on 1 - cosine, with as many clusters as have the best mean silhouette, up to the number of experts,
    as FedLEASE does (https://arxiv.org/abs/2510.26165) with the B of adapters that were trained apart. Here the shared
    model has been averaged all along and the *head's* changes are compared: of few steps from a common start, B has
    more noise than signal, while the head's changes follow the classes' mean features (measured on owners of 400
    rows: cosines .3 to .45 within kinds of text and -.04 to .2 between them, B's .1 and .07). Without a head it is B.

    Experts are dealt to clusters by size, every cluster has one or more. An owner that comes later leans on the experts
    of the cluster it is nearest to, once its changes are known.
    """

    sees = ("head", "B")
    leans = True

    def __init__(self, params: ClustersParams) -> None:
        self.params, self.warmup = params, params.warmup

    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """Decide after the warm-up, and for owners that came since."""
        if seen.round < self.params.warmup or not seen.changes:
            return seen.known
        clients, rays = directions(seen.changes)
        apart = distances(rays)
        known = {n: seen.known[client] for n, client in enumerate(clients) if client in seen.known}
        if known:
            near = {clients[n]: _nearest(apart[n], known) for n in range(len(clients)) if n not in known}
            return {**seen.known, **near}
        labels, silhouette = clusters(apart, len(seen.experts))
        if silhouette < self.params.least:
            return dict.fromkeys(clients, Leaning())
        theirs = dealt(labels, seen.experts)
        lean = [Leaning(dict.fromkeys(experts, self.params.bias)) for experts in theirs]
        return {client: lean[label] for client, label in zip(clients, labels.tolist(), strict=True)}


def _nearest(apart: NDArray[np.float64], known: Mapping[int, Leaning]) -> Leaning:
    """The leaning whose owners are nearest on average, by distances ``[K]``."""
    return min(known.values(), key=lambda one: float(np.mean([apart[n] for n in known if known[n] == one])))


def dealt(labels: NDArray[np.int64], experts: Sequence[str]) -> list[list[str]]:
    """Experts by cluster: one each, and the others one by one to the cluster with most members per expert."""
    sizes = np.bincount(labels)
    shares = [[expert] for expert in experts[: len(sizes)]]
    for expert in experts[len(sizes) :]:
        neediest = max(range(len(sizes)), key=lambda c: (sizes[c] / len(shares[c]), -c))
        shares[neediest].append(expert)
    return shares
