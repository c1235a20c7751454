"""Temperature, constant or annealed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.molora.interfaces import LogitTransform, RouteContext
from molehill.registry import register


@dataclass(frozen=True)
class TemperatureParams:
    """Parameters of `Temperature`.

    Attributes:
        start: Temperature at the start of training.
        end: Temperature at its end and at inference; ``start`` when omitted.
    """

    start: Annotated[float, Field(gt=0)] = 1.0
    end: Annotated[float, Field(gt=0)] | None = None


@register(
    "transform",
    "temperature",
    params=TemperatureParams,
    paper="Nie et al. 2021, EvoMoE: Dense-to-Sparse Gate",
    url="https://arxiv.org/abs/2112.14397",
)
class Temperature(LogitTransform):
    """``z / tau``; tau goes geometrically from ``start`` to ``end`` as training goes on.

    Above 1 the gate is softer (more experts learn), below 1 sharper.
    """

    by_logits = True

    def __init__(self, params: TemperatureParams) -> None:
        self.start = params.start
        self.end = params.start if params.end is None else params.end

    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits of the same shape."""
        progress = ctx.progress if ctx.training else 1.0
        tau: float = self.start ** (1 - progress) * self.end**progress
        return z / tau
