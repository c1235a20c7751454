"""The point with the smallest sum of distances (geometric median)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.lowrank import squared_distances
from molehill_server.aggregation.robust import Matrix, chosen_weights
from molehill_server.records import Global, Update


@dataclass(frozen=True)
class GeometricMedianParams:
    """Parameters of `GeometricMedian`.

    Attributes:
        iterations: Most steps of Weiszfeld's algorithm.
        smoothing: Distances below this part of the typical distance between two clients count as if they were it.
    """

    iterations: Annotated[int, Field(ge=1)] = 200
    smoothing: Annotated[float, Field(gt=0, le=1)] = 1e-6


@register(
    "rule",
    "geometric_median",
    params=GeometricMedianParams,
    paper="Pillutla et al. 2022, Robust Aggregation for Federated Learning (RFA)",
    url="https://arxiv.org/abs/1912.13445",
)
class GeometricMedian(WeightRule):
    """Minimises the sum of distances to all updates.

    While f of the n clients of a round lie and f < n/2, the result is no further from any point than
    ``2 (n - f) / (n - 2 f)`` times the distance within which all honest clients are (Minsker 2015, lemma 2.1): 3.3 for
    two of seven, 8 for three. That holds at every expert: a client that did not use an expert votes for its old value,
    and an expert that no more than half of the clients used keeps its value.

    Weiszfeld's algorithm on inner products alone: the median is a weighted mean of the updates, and the squared
    distance of the mean with weights w from update i is ``w G w - 2 (G w)_i + G_ii``. Per expert, and for router and
    head. The paper weighs by examples; here clients count alike, and its smoothing is relative to the distances.
    """

    additive = False
    needs_products = True
    unused_votes: Literal[True] = True
    least = 3  # of two, neither is outvoted

    def __init__(self, params: GeometricMedianParams) -> None:
        self._params = params

    def weights(self, updates: Sequence[Update], glob: Global, /) -> list[Weight]:
        """Weights of the median of each expert, which sum to 1."""
        return chosen_weights(updates, glob, self.least, self._choose)

    def _choose(self, gram: Matrix) -> Matrix:
        weights = np.full(len(gram), 1 / len(gram))
        apart = np.sqrt(squared_distances(gram))
        if not apart.any():
            return weights
        typical = np.median(np.median(apart, axis=1))  # of the many; the few cannot move it
        floor = max(self._params.smoothing * typical, np.finfo(np.float64).eps * apart.max())
        for _ in range(self._params.iterations):
            pulled = gram @ weights
            gaps = np.sqrt(np.maximum(weights @ pulled - 2 * pulled + np.diag(gram), 0))
            before, weights = weights, 1 / np.maximum(gaps, floor)
            weights /= weights.sum()
            if np.abs(weights - before).max() < 1e-9:
                break
        return weights
