"""Switch: one expert per token, and a limit on how many tokens it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.molora.interfaces import Route, RouteContext, Selector
from molehill.molora.selectors.top_k import TopK, TopKParams, limited
from molehill.registry import register


@dataclass(frozen=True)
class SwitchParams:
    """Parameters of `Switch`.

    Attributes:
        capacity: Tokens an expert takes per training batch, as a multiple of the even share; no limit when omitted.
    """

    capacity: Annotated[float, Field(gt=0)] | None = 1.25


@register(
    "selector",
    "switch",
    params=SwitchParams,
    paper="Fedus, Zoph and Shazeer 2021, Switch Transformers",
    url="https://arxiv.org/abs/2101.03961",
    seeds=("S171",),
)
class Switch(Selector):
    """Top-1, weighted by its probability (not renormalised, so that the router learns).

    In training an expert takes at most ``capacity * tokens / E`` tokens of the batch, in order of arrival; the rest
    keep the frozen output. Padding neither takes nor needs a place. ``aux["selected"]`` is the choice before the
    limit, which the balance loss counts.
    """

    by_logits = True

    def __init__(self, params: SwitchParams) -> None:
        self.capacity = params.capacity
        self.per_row = params.capacity is None  # places are shared by all rows of a batch
        self._top_1 = TopK(TopKParams(k=1, renorm="none"))

    def eval_form(self) -> Selector:
        """Top-1 without a limit."""
        return self._top_1

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[B|1, T|1, (H,) E]``."""
        route = self._top_1(z, ctx)
        if self.capacity is None or not ctx.training:
            return route
        return limited(route, ctx, self.capacity)
