"""The mean of each number without its extremes (trimmed mean)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from molehill.registry import register
from molehill.wire.tree import Array
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.robust import equal_weights
from molehill_server.records import Global, Update


@dataclass(frozen=True)
class TrimmedMeanParams:
    """Parameters of `TrimmedMean`.

    Attributes:
        f: Poisoned clients to withstand: so many values are dropped at either end. A round needs 2 f + 1 updates.
    """

    f: Annotated[int, Field(ge=1)] = 1


@register(
    "rule",
    "trimmed_mean",
    params=TrimmedMeanParams,
    paper="Yin et al. 2018, Byzantine-Robust Distributed Learning",
    url="https://arxiv.org/abs/1803.01498",
)
class TrimmedMean(WeightRule):
    """Drops the f largest and the f smallest values of every number of the product and averages the others.

    While no more than f clients lie, each number of the merged product lies between values of honest clients, at every
    expert: one that fewer than 2 f + 1 clients used keeps its value. The products of the experts are merged, never
    their factors; the result is brought back to factors by lower ``svd``. Clients count alike.
    """

    needs_products = True

    def __init__(self, params: TrimmedMeanParams) -> None:
        self._f = params.f

    @property
    def least(self) -> int:
        """2 f + 1, so that a value is left."""
        return 2 * self._f + 1

    def weights(self, updates: Sequence[Update], _glob: Global, /) -> list[Weight]:
        """Who takes part."""
        return equal_weights(updates)

    def merge(self, stack: Array, /) -> Array:
        """The trimmed mean over the first axis."""
        kept = np.sort(stack, axis=0)[self._f : len(stack) - self._f]
        merged: Array = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
        return merged
