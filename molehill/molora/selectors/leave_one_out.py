"""Mixtures of all experts but one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@dataclass(frozen=True)
class LeaveOneOutParams:
    """Parameters of `LeaveOneOut`.

    Attributes:
        gate: How often, in the mean, a pass of training is the gate's; the others are the experts'.
    """

    gate: Annotated[float, Field(gt=0, le=1)] = 0.2


@register(
    "selector",
    "leave_one_out",
    params=LeaveOneOutParams,
    paper="Peng et al. 2020, A Mixture of h - 1 Heads is Better than h Heads",
    url="https://arxiv.org/abs/2005.06537",
)
class LeaveOneOut(Selector):
    """``w_e = E / (E - 1) (1 - g_e)``, g the softmax: the mixture, by g, of the ensembles that lack one expert each.

    The weights sum to E, and are all 1 where g is even. In training a pass of the gate is that; in a pass of the
    experts every token leaves out one, drawn by g, and g does not learn. One expert alone has weight 1.
    """

    random = True

    def __init__(self, params: LeaveOneOutParams) -> None:
        self.gate = params.gate
        self.bound = 2.0  # E / (E - 1) of two experts

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        n, g = z.shape[-1], softmax(z)
        if n == 1:
            return Route(z, torch.ones_like(z), g)
        if ctx.training and float(torch.rand(())) >= self.gate:
            left_out = torch.multinomial(g.detach().flatten(0, -2), 1).view(z.shape[:-1])
            return Route(z, (1 - F.one_hot(left_out, n).to(z.dtype)) * (n / (n - 1)), g)
        return Route(z, (1 - g) * (n / (n - 1)), g)
