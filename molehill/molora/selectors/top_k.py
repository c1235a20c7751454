"""The k best experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax, top_k_mask, top_k_softmax
from molehill.molora.interfaces import OfK, Route, RouteContext
from molehill.molora.tokens import token_counts
from molehill.registry import register


@dataclass(frozen=True)
class TopKParams:
    """Parameters of `TopK`.

    Attributes:
        k: Experts per token; all when there are fewer.
        renorm: ``selected``: the weights of the chosen experts sum to 1 (MixLoRA, MoLA); ``none``: they keep their
            probability among all experts (DeepSeekMoE).
        capacity: In training an expert takes so many tokens of a batch at most, as a multiple of the even share, in
            order of arrival; the others go without it. No limit when omitted.
        start: In training the number of experts goes linearly from this to ``k`` (VER); it is ``k`` throughout when
            omitted, and at inference.
    """

    k: Annotated[int, Field(ge=1)] = 2
    renorm: Literal["none", "selected"] = "selected"
    capacity: Annotated[float, Field(gt=0)] | None = None
    start: Annotated[int, Field(ge=1)] | None = None


@register(
    "selector",
    "top_k",
    params=TopKParams,
    paper="Shazeer et al. 2017, Outrageously Large Neural Networks",
    url="https://arxiv.org/abs/1701.06538",
    seeds=("S2", "S113", "S180"),
)
class TopK(OfK):
    """The k largest logits, weighted by their softmax.

    Softmax over the chosen logits is the same as softmax over all, then division by the sum of the chosen.
    """

    by_logits = True

    def __init__(self, params: TopKParams) -> None:
        self.params = params
        self.per_row = params.capacity is None  # places are shared by all rows of a batch

    def eval_form(self) -> TopK:
        """The same without a limit."""
        return self if self.params.capacity is None else TopK(replace(self.params, capacity=None))

    def with_k(self, k: int) -> TopK:
        """See `OfK.with_k`."""
        return TopK(replace(self.params, k=k))

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        route = self._chosen(z, min(self._k(ctx), z.shape[-1]))
        return route if self.params.capacity is None or not ctx.training else limited(route, ctx, self.params.capacity)

    def _k(self, ctx: RouteContext) -> int:
        k, start = self.params.k, self.params.start
        return k if start is None or not ctx.training else round(start + (k - start) * ctx.progress)

    def _chosen(self, z: Tensor, k: int) -> Route:
        if self.params.renorm == "selected":
            return Route(z, top_k_softmax(z, k))
        p = softmax(z)
        return Route(z, p * top_k_mask(z, k), p)


def limited(route: Route, ctx: RouteContext, capacity: float) -> Route:
    """A route in which an expert takes no more tokens than its capacity, in order of arrival.

    Padding neither takes nor needs a place. ``aux["selected"]`` is the choice before the limit, which balance counts.

    Args:
        route: Before.
        ctx: Says which tokens are real.
        capacity: Multiple of the even share of all choices.
    """
    z, chosen = route.logits, route.selected
    real = (token_counts(ctx.mask, z) > 0).view(*z.shape[:2], *[1] * (z.ndim - 2))
    queue = (chosen & real).flatten(0, -2)
    limit = (queue.sum() * capacity / z.shape[-1]).floor().clamp_min(1)  # divided last: a whole share stays whole
    fits = queue & (queue.cumsum(0) <= limit)
    return Route(z, route.weights * fits.view(z.shape), route.distribution, {"selected": chosen})
