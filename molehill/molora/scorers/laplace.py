"""Distances to learnt centres."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.errors import ConfigError
from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class LaplaceParams:
    """Parameters of `Laplace`.

    Attributes:
        groups: Experts lie in so many groups of equal size, in their order, each with a centre of its own; 1 is one
            level.
    """

    groups: Annotated[int, Field(ge=1)] = 1


@register(
    "scorer",
    "laplace",
    params=LaplaceParams,
    paper="Nguyen et al. 2024, On Expert Estimation in Hierarchical Mixture of Experts",
    url="https://arxiv.org/abs/2410.02935",
)
class Laplace(Scorer):
    """``z_e = -||x - c_e|| + b_e``: an expert is for the tokens near its centre.

    With groups the softmax of z is that of two levels, ``g_i g_(e|i)``: the logarithms of both are added.

    Attributes:
        centres: ``[E, d]`` float32.
        bias: ``[E]``.
        group_centres: ``[G, d]``; none with one group.
        group_bias: ``[G]``.

    Raises:
        ConfigError: The groups do not divide the experts.
    """

    def __init__(self, params: LaplaceParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts, self.groups = n_experts, params.groups
        if n_experts % params.groups:
            raise ConfigError(
                f"{n_experts} experts do not lie in {params.groups} groups of equal size",
                where="molora.scorer.groups",
                mend="Give a number that divides molora.experts.",
            )
        self.ordered = params.groups > 1
        self.centres = nn.Parameter(torch.randn(n_experts, d_in) / d_in**0.5)
        self.bias = nn.Parameter(torch.zeros(n_experts))
        if self.ordered:
            self.group_centres = nn.Parameter(torch.randn(params.groups, d_in) / d_in**0.5)
            self.group_bias = nn.Parameter(torch.zeros(params.groups))

    def axes(self) -> Mapping[str, int]:
        """Rows; experts of groups cannot change places."""
        return {name: -1 if self.ordered else 0 for name, _ in self.named_parameters()}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        x = ctx.x.float()
        z = _near(x, self.centres) + self.bias
        if not self.ordered:
            return z
        group = (_near(x, self.group_centres) + self.group_bias).log_softmax(-1)
        inside = z.view(*z.shape[:-1], self.groups, -1).log_softmax(-1)
        return (group.unsqueeze(-1) + inside).flatten(-2)


def _near(x: Tensor, centres: Tensor) -> Tensor:
    """``-||x - c||`` for ``x [B, T, d]`` and ``c [N, d]``, ``[B, T, N]``."""
    # Only differences count, and the squares below cancel where x and c are both far from 0.
    middle = centres.mean(0)
    x, centres = x - middle, centres - middle
    square = x.square().sum(-1, keepdim=True) - 2 * (x @ centres.T) + centres.square().sum(-1)
    return -(square.clamp_min(0.0) + 1e-9).sqrt()
