"""No blend."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.interfaces import Blend
from molehill.registry import register


@register(
    "blend",
    "full",
    paper="Dai et al. 2024, DeepSeekMoE: shared experts",
    url="https://arxiv.org/abs/2401.06066",
)
class Full(Blend):
    """Always-on experts have weight 1, and routed ones what the selector gives them."""

    plain = True

    def __init__(self, *, d_in: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """1 and 1, ``[1, 1, 1]``."""
        one = x.new_ones(1, 1, 1)
        return one, one
