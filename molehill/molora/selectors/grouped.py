"""One expert of every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.distributions import softmax, top_k_mask
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@dataclass(frozen=True)
class GroupedParams:
    """Parameters of `Grouped`.

    Attributes:
        groups: Groups (prototypes) of equal size that the experts lie in, in their order.
    """

    groups: Annotated[int, Field(ge=1)] = 1


@register(
    "selector",
    "grouped",
    params=GroupedParams,
    paper="Yang et al. 2021, M6-T: Exploring Sparse Expert Models and Beyond",
    url="https://arxiv.org/abs/2105.15082",
)
class Grouped(Selector):
    """k top-1: the best expert of every group, weighted by its softmax in the group; the groups add up.

    One group is Switch without a limit; as many groups as experts has all of them at weight 1.
    """

    by_logits = True
    ordered = True

    def __init__(self, params: GroupedParams) -> None:
        self.groups = params.groups

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``.

        Raises:
            ConfigError: The groups do not divide the experts.
        """
        del ctx
        if z.shape[-1] % self.groups:
            raise ConfigError(
                f"{z.shape[-1]} experts do not lie in {self.groups} groups of equal size",
                where="molora.selector.groups",
                mend="Give a number that divides molora.experts.",
            )
        parts = z.view(*z.shape[:-1], self.groups, -1)
        p = softmax(parts)
        best = top_k_mask(parts, 1)
        return Route(z, (p * best).flatten(-2), p.flatten(-2) / self.groups)
