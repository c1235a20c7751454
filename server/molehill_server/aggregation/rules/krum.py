"""The update nearest to its neighbours (Krum)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.lowrank import squared_distances
from molehill_server.aggregation.robust import Matrix, chosen_weights
from molehill_server.records import Global, Update


@dataclass(frozen=True)
class KrumParams:
    """Parameters of `Krum`.

    Attributes:
        f: Poisoned clients to withstand; a round needs 2 f + 3 updates.
    """

    f: Annotated[int, Field(ge=1)] = 1


@register(
    "rule",
    "krum",
    params=KrumParams,
    paper="Blanchard et al. 2017, Krum",
    url="https://papers.nips.cc/paper/6617-machine-learning-with-adversaries-byzantine-tolerant-gradient-descent",
)
class Krum(WeightRule):
    """Takes the one update with the smallest sum of squared distances to its n - f - 2 nearest neighbours.

    The paper chooses once for a whole update; here it is done per expert and for router and head, since every expert
    has clients of its own (see `molehill_server.aggregation.robust`).
    """

    additive = False
    needs_products = True

    def __init__(self, params: KrumParams) -> None:
        self._f = params.f

    @property
    def least(self) -> int:
        """2 f + 3, the condition of the paper's theorem."""
        return 2 * self._f + 3

    def weights(self, updates: Sequence[Update], glob: Global, /) -> list[Weight]:
        """Weight 1 for the chosen update of each expert, 0 for the others."""
        return chosen_weights(updates, glob, self.least, self._choose)

    def _choose(self, gram: Matrix) -> Matrix:
        return nearest(gram, self._f, 1)


def nearest(gram: Matrix, f: int, count: int) -> Matrix:
    """Weight 1 for the ``count`` points of lowest Krum score among n, 0 for the others.

    Args:
        gram: Inner products ``[n, n]``.
        f: Poisoned points; at most n - 3.
        count: Points to choose.
    """
    apart = squared_distances(gram)
    np.fill_diagonal(apart, np.inf)
    scores = np.sort(apart, axis=1)[:, : max(1, len(gram) - f - 2)].sum(axis=1)
    weights = np.zeros(len(gram))
    weights[np.argsort(scores, kind="stable")[:count]] = 1.0
    return weights
