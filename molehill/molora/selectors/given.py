"""Weights as the scorer gives them."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.registry import register


@register(
    "selector",
    "given",
    paper="Hadji-Kyriacou and Arandjelovic 2024, Context-PEFT",
    url="https://arxiv.org/abs/2312.08900",
)
class Given(Selector):
    """``w = z``, from 0 to 1: for scorers that know who is meant. Several experts may have weight 1, or none."""

    by_logits = True
    may_close = True

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[..., E]``."""
        w = z.clamp(0.0, 1.0)
        return Route(z, w, w / w.sum(-1, keepdim=True).clamp_min(1e-8))
