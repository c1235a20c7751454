"""Product space: the products B A are averaged."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.aggregation.interfaces import Space
from molehill_server.aggregation.sums import ProductSum
from molehill_server.records import Global


@register("space", "product", paper="Bai et al. 2024, FlexLoRA", url="https://arxiv.org/abs/2402.11505")
class Product(Space):
    """Averages the products ``B A`` as factors of rank at most min(d_out, d_in); any mix of client ranks is exact.

    Memory does not grow with the number of clients: beyond that rank the sum is factored anew by QR, exactly.
    """

    products = True
    folds = True

    def start(self, glob: Global, /) -> ProductSum:
        """An empty mean."""
        return ProductSum(glob, folded=True)
