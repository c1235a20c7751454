"""Stack space: the clients' factors side by side (FLoRA)."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.aggregation.interfaces import Space
from molehill_server.aggregation.sums import ProductSum
from molehill_server.records import Global


@register("space", "stack", paper="Wang et al. 2024, FLoRA", url="https://arxiv.org/abs/2409.05976")
class Stack(Space):
    """Puts the clients' factors side by side, ``[p_1 B_1 .. p_K B_K] [A_1; ..; A_K]`` of rank ``sum_k r_k``.

    No arithmetic but the weights: the A's are the clients' bits. Rank, memory and download grow with the number
    of clients.
    """

    products = True

    def start(self, glob: Global, /) -> ProductSum:
        """An empty stack."""
        return ProductSum(glob, folded=False)
