"""The k best experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax, top_k_mask, top_k_softmax
from molehill.molora.interfaces import OfK, Route, RouteContext
from molehill.registry import register


@dataclass(frozen=True)
class TopKParams:
    """Parameters of `TopK`.

    Attributes:
        k: Experts per token; all when there are fewer.
        renorm: ``selected``: the weights of the chosen experts sum to 1 (MixLoRA, MoLA); ``none``: they keep their
            probability among all experts (DeepSeekMoE).
    """

    k: Annotated[int, Field(ge=1)] = 2
    renorm: Literal["none", "selected"] = "selected"


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

    def with_k(self, k: int) -> TopK:
        """See `OfK.with_k`."""
        return TopK(replace(self.params, k=k))

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        k = min(self.params.k, z.shape[-1])
        if self.params.renorm == "selected":
            return Route(z, top_k_softmax(z, k))
        p = softmax(z)
        return Route(z, p * top_k_mask(z, k), p)
