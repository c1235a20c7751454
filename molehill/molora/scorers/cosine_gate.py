"""Cosines in few dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class CosineGateParams:
    """Parameters of `CosineGate`.

    Attributes:
        width: Dimensions in which tokens and experts are compared.
        temperature: Divides the cosine.
    """

    width: Annotated[int, Field(ge=1)] = 32
    temperature: Annotated[float, Field(gt=0)] = 0.07


@register(
    "scorer",
    "cosine_gate",
    params=CosineGateParams,
    paper="Chi et al. 2022, On the Representation Collapse of Sparse Mixture of Experts",
    url="https://arxiv.org/abs/2204.09179",
)
class CosineGate(Scorer):
    """``z_e = cos(P x, w_e) / tau``: neither the length of a token's state nor that of an expert's row counts.

    Differs from the paper: the temperature stays as it is given.

    Attributes:
        project: ``[width, d]`` float32.
        weight: ``[E, width]``.
    """

    def __init__(self, params: CosineGateParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts, self._temperature = n_experts, params.temperature
        self.project = nn.Parameter(torch.randn(params.width, d_in) / d_in**0.5)
        self.weight = nn.Parameter(torch.randn(n_experts, params.width))

    def axes(self) -> Mapping[str, int]:
        """Rows of the experts."""
        return {"project": -1, "weight": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        low = F.normalize(ctx.x.float() @ self.project.T, dim=-1, eps=1e-6)
        return low @ F.normalize(self.weight, dim=-1, eps=1e-6).T / self._temperature
