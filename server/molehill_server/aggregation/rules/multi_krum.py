"""The mean of the updates nearest to their neighbours (multi-Krum)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.registry import register
from molehill_server.aggregation.interfaces import Weight, WeightRule
from molehill_server.aggregation.robust import Matrix, chosen_weights
from molehill_server.aggregation.rules.krum import nearest
from molehill_server.records import Global, Update


@dataclass(frozen=True)
class MultiKrumParams:
    """Parameters of `MultiKrum`.

    Attributes:
        f: Poisoned clients to withstand; a round needs 2 f + 3 updates.
        m: Most updates to average; None is all that the theorem allows, n - f - 2.
    """

    f: Annotated[int, Field(ge=1)] = 1
    m: Annotated[int, Field(ge=1)] | None = None


@register(
    "rule",
    "multi_krum",
    params=MultiKrumParams,
    paper="Blanchard et al. 2017, multi-Krum",
    url="https://papers.nips.cc/paper/6617-machine-learning-with-adversaries-byzantine-tolerant-gradient-descent",
)
class MultiKrum(WeightRule):
    """Averages the m updates of lowest Krum score, per expert and for router and head; m = 1 is `Krum`.

    The bound m <= n - f - 2 is that of El Mhamdi et al. 2018 (https://arxiv.org/abs/1802.07927).
    """

    additive = False
    needs_products = True

    def __init__(self, params: MultiKrumParams) -> None:
        self._params = params

    @property
    def least(self) -> int:
        """2 f + 3, as for Krum."""
        return 2 * self._params.f + 3

    def weights(self, updates: Sequence[Update], glob: Global, /) -> list[Weight]:
        """Weight 1 for the chosen updates of each expert, 0 for the others."""
        return chosen_weights(updates, glob, self.least, self._choose)

    def _choose(self, gram: Matrix) -> Matrix:
        most = max(1, len(gram) - self._params.f - 2)
        return nearest(gram, self._params.f, min(most, self._params.m or most))
