"""As few adapted sites as pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss, Seen
from molehill.registry import register


@dataclass(frozen=True)
class SiteL1Params:
    """Parameters of `SiteL1`.

    Attributes:
        after: Part of training that passes before it counts.
        target: Part of the sites that may be adapted: it counts while more are.
    """

    after: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target: Annotated[float, Field(ge=0, le=1)] = 0.0


@register(
    "routing_loss",
    "site_l1",
    params=SiteL1Params,
    paper="Wallingford et al. 2022, Task Adaptive Parameter Sharing for Multi-Task Learning",
    url="https://arxiv.org/abs/2203.16708",
)
class SiteL1(RoutingLoss):
    """``mean |s|`` over the scores of sites (`molehill.molora.allocations.gated_sites`), after a part of training."""

    of_sites = True

    def __init__(self, params: SiteL1Params) -> None:
        self._params = params

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean; 0 where no site has a score, or few enough are adapted."""
        if not isinstance(records, Seen) or not records.scores or records.progress < self._params.after:
            return torch.zeros(())
        scores = torch.cat([score for score, _ in records.scores])
        adapted = sum(bool(score.detach() >= threshold) for score, threshold in records.scores)
        if adapted <= self._params.target * len(records.scores):
            return scores.sum() * 0.0
        return scores.abs().mean()
