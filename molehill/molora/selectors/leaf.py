"""One way down a tree."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.distributions import softmax
from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.molora.trees import greedy
from molehill.registry import register


@register(
    "selector",
    "leaf",
    paper="Belcak and Wattenhofer 2023, Fast Feedforward Networks",
    url="https://arxiv.org/abs/2308.14711",
)
class Leaf(Selector):
    """In training all leaves, by their probability; at inference the one where the likelier side of every node leads.

    That leaf is not always the likeliest one. Balance losses count it in training, too.
    """

    by_logits = True

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]`` of the leaves of `molehill.molora.trees`."""
        p = softmax(z)
        hard = greedy(p.detach())
        return Route(z, p if ctx.training else hard, p, {"selected": hard > 0})
