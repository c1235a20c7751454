"""CartesianMoE: two layers of experts, so that a token has a pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molehill.molora.steps import BlockTopology, Run, Step
from molehill.registry import register

_EPSILON = 1e-6


@dataclass(frozen=True)
class ProductParams:
    """Parameters of `Product`.

    Attributes:
        norm: Bring the second layer's input to the root mean square of the block's.
    """

    norm: bool = True


@register(
    "topology",
    "product",
    params=ProductParams,
    paper="Su et al. 2024, CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing",
    url="https://arxiv.org/abs/2410.16077",
)
class Product(BlockTopology):
    """Two banks beside a block, the second on what the first made: E + E experts give a token one of E x E pairs.

    ``x_1 = x + sum_a w_a delta_a(x)``, and ``y = block(x) + sum_a w_a delta_a(x) + sum_b w_b delta_b(norm(x_1))``, each
    layer with a router of its own. Of expert ``e1`` there is one in either bank.
    """

    def __init__(self, params: ProductParams) -> None:
        self._norm = params.norm

    def steps(self, experts: int) -> tuple[Step, ...]:
        """One through either bank."""
        del experts
        return Step(0), Step(1)

    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """The sum over banks."""
        del y0
        first = run(0, x).delta
        between = x + first
        if self._norm:
            between = between * (_square(x) * torch.rsqrt(_square(between))).to(x.dtype)
        return first + run(1, between).delta


def _square(x: Tensor) -> Tensor:
    return x.float().pow(2).mean(-1, keepdim=True) + _EPSILON
