"""Experts that choose tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@dataclass(frozen=True)
class ExpertChoiceParams:
    """Parameters of `ExpertChoice`.

    Attributes:
        capacity: Experts per token in the mean; an expert takes ``capacity / E`` of the tokens of a row, rounded up.
    """

    capacity: Annotated[float, Field(gt=0)] = 2.0


@register(
    "selector",
    "expert_choice",
    params=ExpertChoiceParams,
    paper="Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing",
    url="https://arxiv.org/abs/2202.09368",
)
class ExpertChoice(Selector):
    """Every expert takes the tokens of a row that have the highest probability of it; all take equally many.

    The weight of a token is its softmax over experts. A token may be taken by several, or by none and keep the frozen
    output; padding is taken by nobody. A token's route depends on later ones, so this is for classifiers: a model that
    writes cannot have it. Where tokens come one after another, the whole batch counts as one row.
    """

    causal = False
    may_close = True
    masked = True

    def __init__(self, params: ExpertChoiceParams) -> None:
        self.capacity = params.capacity

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[B, T, (H,) E]``; logits of whole rows (T of 1) all experts take."""
        p = softmax(z)
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if ctx.mask is None else ctx.mask
        if real.shape != z.shape[:2]:  # one route for all tokens of a row
            return Route(z, p, p)
        real = real.view(*z.shape[:2], *[1] * (z.ndim - 2))
        # multiplied before it is divided: a share that is whole must not be rounded up past itself
        count = (real.sum(1, keepdim=True) * self.capacity / z.shape[-1]).ceil().clamp_max(z.shape[1])
        # places among the tokens of the row; padding comes last, and equal ones in their order
        keys = p.masked_fill(~real, -1.0)
        places = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        chosen = (places < count) & real
        return Route(z, p * chosen, p, {"selected": chosen})
