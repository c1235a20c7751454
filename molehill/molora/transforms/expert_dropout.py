"""Dropout of whole experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.interfaces import LogitTransform, RouteContext
from molehill.registry import register


@dataclass(frozen=True)
class ExpertDropoutParams:
    """Parameters of `ExpertDropout`.

    Attributes:
        p: Probability that an expert is closed to a token.
    """

    p: Annotated[float, Field(ge=0, lt=1)] = 0.1


@register(
    "transform",
    "expert_dropout",
    params=ExpertDropoutParams,
    paper="Zhu et al. 2023, SiRA: Sparse Mixture of Low Rank Adaptation",
    url="https://arxiv.org/abs/2311.09179",
)
class ExpertDropout(LogitTransform):
    """In training every expert is closed to a token with probability p, so that others learn to stand in for it.

    The selector chooses among those that are left, and shares the weight between these. Where a token would have none
    left it keeps all. At inference nothing is closed.
    """

    random = True

    def __init__(self, params: ExpertDropoutParams) -> None:
        self._p = params.p

    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits of the same shape."""
        if not (ctx.training and self._p):
            return z
        closed = torch.rand_like(z) < self._p
        closed = closed & ~closed.all(-1, keepdim=True)
        return z.masked_fill(closed, torch.finfo(z.dtype).min)
