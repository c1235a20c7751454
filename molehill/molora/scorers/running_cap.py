"""A linear scorer that shuts experts which had more than their share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class RunningCapParams:
    """Parameters of `RunningCap`.

    Attributes:
        margin: By how much an expert's running gate mass may exceed the mean, as a part of the mean.
        phase: Part of training, from its start, in which it may not.
        std: Standard deviation of the start values.
    """

    margin: Annotated[float, Field(ge=0)] = 0.5
    phase: Annotated[float, Field(ge=0, le=1)] = 0.2
    std: Annotated[float, Field(gt=0)] = 0.02


@register(
    "scorer",
    "running_cap",
    params=RunningCapParams,
    paper="Eigen, Ranzato and Sutskever 2013, Learning Factored Representations in a Deep Mixture of Experts",
    url="https://arxiv.org/abs/1312.4314",
)
class RunningCap(Scorer):
    """``z = x W^T``; at the start of training an expert that had more than its share is shut until others caught up.

    Balance without a loss for it, of the gate mass of all tokens so far. Later, and at inference, it is the linear
    scorer. What was counted stays with the client, and a round counts anew.

    Attributes:
        weight: ``[E, d]`` float32.
        mass: Gate mass of every expert in this round so far, ``[E]``.
    """

    fixed = frozenset({"mass"})
    adapts = True

    def __init__(self, params: RunningCapParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts, self.params = n_experts, params
        self.weight = nn.Parameter(torch.randn(n_experts, d_in) * params.std)
        self.mass = nn.Parameter(torch.zeros(n_experts))

    def axes(self) -> Mapping[str, int]:
        """Rows."""
        return {"weight": 0, "mass": 0}

    @torch.no_grad()
    def adapt(self, mass: Tensor) -> None:
        """See `Adapts`."""
        self.mass.copy_(mass)

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        z = ctx.x.float() @ self.weight.T
        if not ctx.training or ctx.progress >= self.params.phase:
            return z
        shut = self.mass > (1 + self.params.margin) * self.mass.mean()  # never all: the least is not above the mean
        return z.masked_fill(shut, torch.finfo(z.dtype).min)
