"""Mixture of Routers: several sub-routers under a main router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.molora.scorers.linear import init_rows
from molehill.registry import register


@dataclass(frozen=True)
class MixtureParams:
    """Parameters of `Mixture`.

    Attributes:
        m: Number of sub-routers.
        init: Start values of all rows; see the linear scorer.
        std: Standard deviation for ``normal``.
    """

    m: Annotated[int, Field(ge=1)] = 3
    init: Literal["kaiming", "normal", "switch"] = "kaiming"
    std: Annotated[float, Field(gt=0)] = 0.02


@register(
    "scorer",
    "mixture",
    params=MixtureParams,
    paper="Zhang et al. 2025, Mixture of Routers",
    url="https://arxiv.org/abs/2503.23362",
    seeds=("S3", "Z5"),
)
class Mixture(Scorer):
    """``z = log sum_m a_m p_m`` with p_m = softmax(W_m x) of sub-router m and a = softmax(W_0 x) of the main router.

    The softmax of these logits is the mixed distribution itself. Sub-routers can be averaged over clients while each
    client keeps its main router, which has only M * d numbers.

    Attributes:
        sub: Rows of the sub-routers, ``[M, E, d]`` float32.
        main: Rows of the main router, ``[M, d]`` float32.
    """

    own = frozenset({"main"})

    def __init__(self, params: MixtureParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.sub = nn.Parameter(torch.empty(params.m, n_experts, d_in))
        self.main = nn.Parameter(torch.empty(params.m, d_in))
        init_rows(self.sub, params.init, params.std)
        init_rows(self.main, params.init, params.std)

    def axes(self) -> Mapping[str, int]:
        """Only sub-routers have rows of experts."""
        return {"sub": 1, "main": -1}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``; their exponentials sum to 1."""
        m, n_experts, d = self.sub.shape
        x = ctx.x.float()
        sub = (x @ self.sub.reshape(m * n_experts, d).T).view(*x.shape[:-1], m, n_experts).log_softmax(-1)
        main = (x @ self.main.T).log_softmax(-1)
        return torch.logsumexp(main.unsqueeze(-1) + sub, dim=-2)
