"""Every expert takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molehill.molora.distributions import softmax
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@dataclass(frozen=True)
class DenseParams:
    """Parameters of `Dense`.

    Attributes:
        activation: ``softmax`` (LoRAMoE, MoV); ``sigmoid``: every gate on its own; ``sigmoid_norm``: sigmoids over
            their sum (Poly).
    """

    activation: Literal["softmax", "sigmoid", "sigmoid_norm"] = "softmax"


@register(
    "selector",
    "dense",
    params=DenseParams,
    paper="Dou et al. 2023, LoRAMoE; sigmoid_norm: Ponti et al. 2022, Combining Modular Skills (Poly)",
    url="https://arxiv.org/abs/2312.09979",
    seeds=("S13", "S20", "S118"),
)
class Dense(Selector):
    """All experts, weighted by the activated logits."""

    by_logits = True

    def __init__(self, params: DenseParams) -> None:
        self.activation = params.activation

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        if self.activation == "softmax":
            w = softmax(z)
            return Route(z, w, w)
        gates = torch.sigmoid(z)
        shares = gates / gates.sum(-1, keepdim=True).clamp_min(1e-8)
        return Route(z, gates if self.activation == "sigmoid" else shares, shares)
