"""Dynamic top-p: as many experts as it takes."""

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
class TopPParams:
    """Parameters of `TopP`.

    Attributes:
        p: Probability mass that the chosen experts reach together.
    """

    p: Annotated[float, Field(gt=0, le=1)] = 0.4


@register(
    "selector",
    "top_p",
    params=TopPParams,
    paper="Huang et al. 2024, Harder Tasks Need More Experts",
    url="https://arxiv.org/abs/2403.07652",
    seeds=("S8",),
)
class TopP(Selector):
    """The smallest set of most probable experts whose mass reaches p, each with its own probability as weight."""

    by_logits = True

    def __init__(self, params: TopPParams) -> None:
        self.p = params.p

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        p = softmax(z)
        return Route(z, p * top_p_mask(p, self.p), p)


def top_p_mask(p: Tensor, mass: float, *, inclusive: bool = True, keep: int = 1) -> Tensor:
    """Choose the most probable experts up to a mass.

    Args:
        p: Distributions ``[..., E]``.
        mass: Mass to reach.
        inclusive: Keep the expert with which the mass is reached; otherwise stop before it.
        keep: Experts that are chosen whatever the mass.

    Returns:
        True for the chosen experts, same shape.
    """
    ranked, order = p.detach().sort(dim=-1, descending=True, stable=True)
    reached = ranked.cumsum(-1)
    within = reached - ranked < mass if inclusive else reached <= mass
    first = torch.arange(p.shape[-1], device=p.device) < keep
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, within | first)
