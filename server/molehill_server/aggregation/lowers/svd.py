"""Best factors of the shared rank (FlexLoRA), with an energy threshold (FLoRIST)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molehill.registry import register
from molehill.wire.keys import Key
from molehill_server.aggregation.interfaces import Combined, Lower
from molehill_server.aggregation.lowrank import svd
from molehill_server.records import AggOut, Global


@dataclass(frozen=True)
class SvdParams:
    """Parameters of `Svd`.

    Attributes:
        tau: Part of the energy (squared singular values) to keep; 1 keeps all that the shared rank can hold, less is
            FLoRIST (https://arxiv.org/abs/2506.09199).
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError("tau must be above 0 and at most 1")


@register("lower", "svd", params=SvdParams, paper="Bai et al. 2024, FlexLoRA", url="https://arxiv.org/abs/2402.11505")
class Svd(Lower):
    """Replaces a product ``U diag(s) V`` by its best approximation of the shared rank.

    That is ``B = U_r diag(s_r)``, ``A = V_r``. The first columns are the best approximation of every lower rank too,
    so a client of rank r_k takes the first r_k. Directions beyond the product's own rank or the threshold have B = 0
    and a nonzero A, so they can still learn.
    """

    tails = True

    def __init__(self, params: SvdParams) -> None:
        self._tau = params.tau

    def lower(self, combined: Combined, _glob: Global, _seed: int, /) -> AggOut:
        """Factored anew, with the mean number of columns in use."""
        tree = combined.tree.copy()
        ranks = []
        for pair, product in combined.products.items():
            u, s, v = svd(product)
            a, b = tree[Key(*pair, "A")], tree[Key(*pair, "B")]  # a holds the mean of factors until overwritten
            n = min(len(a), len(s))
            keep = min(n, self._rank(s, combined.tails.get(pair, 0.0)))
            a[:n] = v[:n]
            b[...] = 0
            b[:, :keep] = u[:, :keep] * s[:keep]
            ranks.append(keep)
        return AggOut(tree, report={"rank": float(np.mean(ranks))} if ranks else {})

    def _rank(self, s: np.ndarray, tail: float) -> int:
        energy = np.cumsum(s**2)
        if self._tau == 1 or not energy[-1]:
            return len(s)
        return int(np.searchsorted(energy, self._tau * (energy[-1] + tail**2))) + 1
