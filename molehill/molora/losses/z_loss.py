"""The router z-loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import mean_over_records
from molehill.registry import register


@register(
    "routing_loss",
    "z_loss",
    paper="Zoph et al. 2022, ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    url="https://arxiv.org/abs/2202.08906",
)
class ZLoss(RoutingLoss):
    """``mean_t (log sum_e exp z_te)^2``: keeps logits small. A shift of all logits changes it, but no weight."""

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, lambda stack: stack.mean(stack.logits.logsumexp(-1).square()))
