"""Common-factor space: one of A and B is the same on all clients (FFA-LoRA, RoLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from molehill.errors import FederationError
from molehill.registry import register
from molehill.wire.keys import Key
from molehill_server.aggregation.interfaces import Combined, Space, Weight
from molehill_server.aggregation.sums import FactorSum, factors
from molehill_server.records import Global, Pair, Update, pairs


@dataclass(frozen=True)
class CommonParams:
    """Parameters of `Common`.

    Attributes:
        factor: The factor that all clients have in common: always ``A``, always ``B``, or ``either`` of them, the
            same one for a whole round.
    """

    factor: Literal["A", "B", "either"] = "A"


@register(
    "space",
    "common",
    params=CommonParams,
    paper="Sun et al. 2024, FFA-LoRA",
    url="https://arxiv.org/abs/2403.12313",
    seeds=("S40",),
)
class Common(Space):
    """Averages one factor while the other is the same everywhere, so that the mean of products is exact.

    ``sum_k p_k B_k A = (sum_k p_k B_k) A``. Streams like factor space; an update that moved the common factor stops
    the round, since the mean would silently be another one.
    """

    products = True
    closed = True

    def __init__(self, params: CommonParams) -> None:
        self.common = params.factor

    def start(self, glob: Global, /) -> _CommonSum:
        """An empty mean."""
        return _CommonSum(glob, self.common)


class _CommonSum:
    def __init__(self, glob: Global, factor: str) -> None:
        self._glob = glob
        self._factor = factor
        self._means = FactorSum(glob)
        self._moving: dict[Pair, str] = {}

    def add(self, update: Update, weight: Weight) -> None:
        for pair in pairs(update.tree):
            for role in ("A", "B"):
                self._check(update, Key(*pair, role))
        self._means.add(update, weight)

    def _check(self, update: Update, key: Key) -> None:
        if key not in update.tree or _starts_with(self._glob.tree[key], update.tree[key]):
            return
        moving = self._moving.setdefault((key.site, key.expert), key.role)
        if key.role == self._factor or moving != key.role:
            raise FederationError(
                f"{key.name} was trained, but space 'common' needs it to be the same on all clients",
                where=update.client,
                mend="Use a policy that freezes it (ffa, rolora), or space 'factor' or 'product'.",
            )

    def finish(self) -> Combined:
        combined = self._means.finish()
        touched = pairs(combined.touched)
        products = {pair: factors(combined.tree, self._glob.tree, pair) for pair in touched}
        return Combined(combined.tree, combined.touched, products)


def _starts_with(whole: np.ndarray, part: np.ndarray) -> bool:
    return bool(np.array_equal(whole[tuple(slice(n) for n in part.shape)], part))
