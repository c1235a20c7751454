"""A linear router in which every owner leans on some experts."""

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
class LeaningParams:
    """Parameters of `Leaning`.

    Attributes:
        init: Start values of the shared rows; see the linear scorer.
        std: Standard deviation for ``normal``.
    """

    init: Literal["kaiming", "normal", "switch"] = "kaiming"
    std: Annotated[float, Field(gt=0)] = 0.02


@register("scorer", "leaning", params=LeaningParams, paper="house: a linear router with a bias of the owner's own")
class Leaning(Scorer):
    """``z = x W^T + b``: W is averaged over the owners, b stays with each.

    An owner has far fewer rows than a router has numbers, and most of what sets it apart is the same in all its rows:
    b says that at once, for one number an expert. ``federation.assign`` may set b, or it is learnt. The shared model
    has no b.

    Attributes:
        weight: ``[E, d]`` float32.
        lean: b ``[E]`` float32, 0 at the start.
    """

    fusable = True
    own = frozenset({"lean"})
    leans = "lean"

    def __init__(self, params: LeaningParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.lean = nn.Parameter(torch.zeros(n_experts))
        init_rows(self.weight, params.init, params.std)

    def axes(self) -> Mapping[str, int]:
        """Rows, and the numbers of b."""
        return {"weight": 0, "lean": 0}

    def offset(self) -> Tensor:
        """B."""
        return self.lean

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, T, E]``."""
        return ctx.x.float() @ self.weight.T + self.lean
