"""DynMoLE's balance loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@register(
    "routing_loss",
    "dynmole_balance",
    paper="Li et al. 2025, DynMoLE",
    url="https://arxiv.org/abs/2504.00661",
    seeds=("Z1",),
)
class DynMoLEBalance(RoutingLoss):
    """``E sum_e W_e P_e``: W_e the mean weight of expert e (not the count, as in Switch), P_e its mean probability."""

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, _loss)


def _loss(stack: Stack) -> Tensor:
    return stack.n_experts * (stack.mean(stack.weights) * stack.mean(stack.probs)).sum(-1)
