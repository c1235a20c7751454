"""GW-MoE: while training, tokens the router is unsure about are broadcast to all experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import uncertainty
from molehill.molora.interfaces import OfK, Route, RouteContext, Selector
from molehill.molora.selectors.top_k import TopK, TopKParams
from molehill.molora.tokens import token_counts
from molehill.registry import register


@dataclass(frozen=True)
class GWParams:
    """Parameters of `GW`.

    Attributes:
        threshold: Shannon entropy from which a token is broadcast, as a part of ln E. The paper's 1.8 nats (question
            answering) and 1.6 nats (GLUE) at 8 experts are 0.87 and 0.77.
        slots: Tokens per sequence that are broadcast at most, in order of arrival.
        k: Experts of every other token.
        renorm: Weights of every other token; see ``top_k``.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.87
    slots: Annotated[int, Field(ge=0)] = 16
    k: Annotated[int, Field(ge=1)] = 2
    renorm: Literal["none", "selected"] = "selected"


@register(
    "selector",
    "gw",
    params=GWParams,
    paper="Wu et al. 2024, GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory",
    url="https://arxiv.org/abs/2406.12375",
    seeds=("S12", "Z2"),
)
class GW(OfK):
    """Top-k, but in training uncertain tokens go to all experts with their probabilities as weights.

    Inference is plain top-k. The released code broadcasts the hidden state itself and not the experts' outputs; this
    follows the paper. ``aux["selected"]`` is the top-k choice, which balance losses count; ``aux["entropy"]`` is the
    entropy over ln E.
    """

    by_logits = True

    def __init__(self, params: GWParams) -> None:
        self.params = params
        self._top_k = TopK(TopKParams(k=params.k, renorm=params.renorm))

    def eval_form(self) -> Selector:
        """Plain top-k."""
        return self._top_k

    def with_k(self, k: int) -> GW:
        """See `OfK.with_k`."""
        return GW(replace(self.params, k=k))

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[B|1, T|1, (H,) E]``."""
        route = self._top_k(z, ctx)
        if not ctx.training:
            return route
        entropy = uncertainty(route.probs.detach())
        real = (token_counts(ctx.mask, z) > 0).view(*z.shape[:2], *[1] * (z.ndim - 3))
        unsure = (entropy >= self.params.threshold) & real
        broadcast = (unsure & (unsure.cumsum(1) <= self.params.slots)).unsqueeze(-1)
        weights = torch.where(broadcast, route.probs, route.weights)
        return Route(z, weights, route.probs, {"selected": route.selected, "entropy": entropy})
