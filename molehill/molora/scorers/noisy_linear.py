"""The noisy gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.molora.scorers.linear import init_rows
from molehill.registry import register


@dataclass(frozen=True)
class NoisyLinearParams:
    """Parameters of `NoisyLinear`.

    Attributes:
        init: Start values of ``weight``, as of the scorer ``linear``.
        std: Standard deviation for ``normal``.
    """

    init: Literal["kaiming", "normal", "switch"] = "kaiming"
    std: Annotated[float, Field(gt=0)] = 0.02


@register(
    "scorer",
    "noisy_linear",
    params=NoisyLinearParams,
    paper="Shazeer et al. 2017, Outrageously Large Neural Networks, equation 4",
    url="https://arxiv.org/abs/1701.06538",
)
class NoisyLinear(Scorer):
    """``z = x W^T``, in training plus normal noise of a scale that is learnt: ``softplus(x N^T)`` for every expert.

    A gate of low noise is sure of an expert; where it is not, others are tried. At inference there is no noise.

    Attributes:
        weight: ``[E, d]`` float32.
        noise: N, ``[E, d]``; zeros at the start, so that the scale is ln 2.
    """

    def __init__(self, params: NoisyLinearParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.noise = nn.Parameter(torch.zeros(n_experts, d_in))
        init_rows(self.weight, params.init, params.std)

    def axes(self) -> Mapping[str, int]:
        """Rows."""
        return {"weight": 0, "noise": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        x = ctx.x.float()
        z = x @ self.weight.T
        return z + torch.randn_like(z) * F.softplus(x @ self.noise.T) if ctx.training else z
