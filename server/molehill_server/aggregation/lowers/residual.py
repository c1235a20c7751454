"""Averaged factors, and what they miss as a patch (FedEx-LoRA)."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.aggregation.interfaces import Combined, Lower
from molehill_server.aggregation.lowrank import EPS, compress, concat, norm
from molehill_server.aggregation.sums import factors
from molehill_server.records import AggOut, Global


@register("lower", "residual", paper="Singhal et al. 2025, FedEx-LoRA", url="https://arxiv.org/abs/2410.09432")
class Residual(Lower):
    """Sends the means of the factors and patches the expert with ``sum_k p_k B_k A_k - B A``.

    That residual is the covariance ``sum_k p_k (B_k - B)(A_k - A)``: its rank is at most (K - 1) r for K clients of
    rank r, and it is kept as factors of that rank. Exact.
    """

    fixed_gauge = True
    patches = True

    def lower(self, combined: Combined, glob: Global, _seed: int, /) -> AggOut:
        """The means and the residuals; a residual within rounding of zero is left out."""
        patch = {}
        for pair, product in combined.products.items():
            means = factors(combined.tree, glob.tree, pair)
            floor = 4 * EPS * norm(product)  # the means are rounded to float32
            residual = compress(concat([product, means], [1.0, -1.0]), floor)
            if residual.rank:
                patch[pair] = residual
        return AggOut(combined.tree, patch)
