"""One number decides, the same for all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import Blend
from molehill.registry import register


@dataclass(frozen=True)
class ScalarParams:
    """Parameters of `Scalar`.

    Attributes:
        start: k at the start; with 0.5 the routed experts have .62 of the weight.
    """

    start: float = 0.5


@register(
    "blend",
    "scalar",
    params=ScalarParams,
    paper="Charalampopoulos et al. 2024, Enhancing Fast Feed Forward Networks with Load Balancing and a Master Leaf "
    "Node",
    url="https://arxiv.org/abs/2405.16836",
)
class Scalar(Blend):
    """Routed experts are weighed by ``s(k)`` and always-on ones by ``1 - s(k)``, s the logistic function.

    Attributes:
        k: ``[1]`` float32.
    """

    def __init__(self, params: ScalarParams, *, d_in: int) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.full((1,), float(params.start)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``1 - s(k)`` and ``s(k)``, ``[B|1, 1, 1]``."""
        k = self.k.view(-1, 1, 1)
        if len(k) > 1:  # of clients, whose rows are equal runs
            k = k.repeat_interleave(len(x) // len(k), 0)
        return torch.sigmoid(-k), torch.sigmoid(k)
