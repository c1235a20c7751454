"""Every token decides."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import Blend
from molehill.registry import register


@register(
    "blend",
    "by_token",
    paper="Su et al. 2024, MaskMoE, as in its authors' code; Rajbhandari et al. 2022, DeepSpeed-MoE: Residual-MoE",
    url="https://arxiv.org/abs/2407.09816",
)
class ByToken(Blend):
    """The weights of always-on and of routed experts are ``softmax(W x)``, of every token.

    Attributes:
        weight: W ``[2, d]`` float32, 0 at the start: half and half.
    """

    def __init__(self, *, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, d_in))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two parts of 1, ``[B, T, 1]``."""
        weight = self.weight.view(-1, 2, x.shape[-1])  # of clients, whose rows are equal runs
        scores = (x.float().reshape(len(weight), -1, x.shape[-1]) @ weight.mT).view(*x.shape[:-1], 2)
        parts = scores.softmax(-1)
        return parts[..., :1], parts[..., 1:]
