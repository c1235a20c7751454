"""One expert, drawn in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax, top_k_mask
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@dataclass(frozen=True)
class GumbelParams:
    """Parameters of `Gumbel`.

    Attributes:
        start: Temperature at the start of training.
        end: Temperature at its end.
    """

    start: Annotated[float, Field(gt=0)] = 2.0
    end: Annotated[float, Field(gt=0)] = 0.1


@register(
    "selector",
    "gumbel",
    params=GumbelParams,
    paper="Jang, Gu and Poole 2016, Categorical Reparameterization with Gumbel-Softmax",
    url="https://arxiv.org/abs/1611.01144",
)
class Gumbel(Selector):
    """The best expert at weight 1; in training it is drawn by the softmax, with the gradient of a soft choice.

    Straight through: the value is that of one expert, the gradient that of the softmax of disturbed logits over the
    temperature, which falls geometrically.
    """

    random = True

    def __init__(self, params: GumbelParams) -> None:
        self.start, self.end = params.start, params.end

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        if not ctx.training:
            return Route(z, top_k_mask(z, 1).to(z.dtype))
        tau: float = self.start ** (1 - ctx.progress) * self.end**ctx.progress
        noise = -torch.empty_like(z).exponential_().log()
        soft = softmax((z + noise) / tau)
        hard = top_k_mask(soft.detach(), 1)
        return Route(z, hard.to(z.dtype) + (soft - soft.detach()), aux={"selected": hard})
