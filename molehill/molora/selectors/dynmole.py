"""DynMoLE: all experts when the router is unsure, few when it is sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import softmax, tsallis
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.molora.selectors.top_p import top_p_mask
from molehill.registry import register


@dataclass(frozen=True)
class DynMoLEParams:
    """Parameters of `DynMoLE`.

    Attributes:
        tau: Normalised entropy above which a token goes to all experts.
        q: Order of the Tsallis entropy; not 1.
        p: Mass of the top-p choice of the other tokens.
        keep_top_k: Experts that such a token gets at least.
        inclusive: Top-p keeps the expert with which the mass is reached (the paper); False stops before it (the
            released code).
    """

    tau: Annotated[float, Field(ge=0, le=1)] = 0.9
    q: Annotated[float, Field(gt=0)] = 1.1
    p: Annotated[float, Field(gt=0, le=1)] = 0.75
    keep_top_k: Annotated[int, Field(ge=1)] = 2
    inclusive: bool = True

    def __post_init__(self) -> None:
        """Refuse the order that the formula does not have.

        Raises:
            ValueError: ``q`` is 1.
        """
        if self.q == 1:
            raise ValueError("q must not be 1; take 1.001 for Shannon's entropy")


@register(
    "selector",
    "dynmole",
    params=DynMoLEParams,
    paper="Li et al. 2025, DynMoLE",
    url="https://arxiv.org/abs/2504.00661",
    seeds=("Z1",),
)
class DynMoLE(Selector):
    """Tokens of high Tsallis entropy take all experts, the others top-p with a floor; weights keep their probability.

    A fresh router is unsure about nearly every token, so routing starts dense and sharpens. ``aux["entropy"]`` is the
    normalised entropy.
    """

    by_logits = True

    def __init__(self, params: DynMoLEParams) -> None:
        self.params = params

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        at = self.params
        p = softmax(z)
        entropy = tsallis(p, at.q)
        few = top_p_mask(p, at.p, inclusive=at.inclusive, keep=at.keep_top_k)
        return Route(z, p * (few | (entropy > at.tau).unsqueeze(-1)), p, {"entropy": entropy})
