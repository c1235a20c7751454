"""The linear scorer of most mixtures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class LinearParams:
    """Parameters of `Linear`.

    Attributes:
        init: ``kaiming``: uniform in +-1/sqrt(d), as ``nn.Linear`` (MoLA); ``normal``: N(0, std) (MixLoRA, MoV);
            ``switch``: normal cut off at two standard deviations, of variance 0.1 / d (Switch).
        std: Standard deviation for ``normal``.
        jitter: In training, every input feature is multiplied by a number drawn from U(1 - jitter, 1 + jitter).
    """

    init: Literal["kaiming", "normal", "switch"] = "kaiming"
    std: Annotated[float, Field(gt=0)] = 0.02
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0


@register(
    "scorer",
    "linear",
    params=LinearParams,
    paper="Shazeer et al. 2017, Outrageously Large Neural Networks; jitter and init: Fedus et al. 2021, Switch",
    url="https://arxiv.org/abs/1701.06538",
    seeds=("S2", "S20", "S113", "S171"),
)
class Linear(Scorer):
    """``z = x W^T``, no bias.

    Jitter belongs here and not among the logit transforms: noise on the input reaches all logits through W, and noise
    on the logits would be another distribution.

    Attributes:
        weight: ``[E, d]`` float32.
        fusable: Whether the logits are always ``x @ weight.T``; jitter needs its own product.
    """

    def __init__(self, params: LinearParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.jitter = params.jitter
        self.fusable = params.jitter == 0
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        init_rows(self.weight, params.init, params.std)

    def axes(self) -> Mapping[str, int]:
        """Rows."""
        return {"weight": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        x = ctx.x.float()
        if self.jitter and ctx.training:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return x @ self.weight.T


@torch.no_grad()
def init_rows(weight: Tensor, init: Literal["kaiming", "normal", "switch"], std: float) -> None:
    """Fill router rows ``[..., d]`` in place; see `LinearParams`."""
    d = weight.shape[-1]
    if init == "normal":
        nn.init.normal_(weight, std=std)
    elif init == "switch":
        sigma = math.sqrt(0.1 / d)
        nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    else:
        nn.init.uniform_(weight, -1 / math.sqrt(d), 1 / math.sqrt(d))
