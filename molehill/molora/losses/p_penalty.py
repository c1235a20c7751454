"""HMoE's parameter penalty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@register(
    "routing_loss",
    "p_penalty",
    paper="Wang et al. 2024, HMoE: Heterogeneous Mixture of Experts for Language Modeling",
    url="https://arxiv.org/abs/2408.10681",
    seeds=("S14",),
)
class PPenalty(RoutingLoss):
    """``E sum_e M_e P_e``: M_e the part of tokens that chose e times its relative size, P_e its mean probability.

    Large experts cost more, so small ones get the easy tokens. Sizes are ranks over their mean (the paper takes the
    sizes themselves), which keeps the coefficient meaningful at any rank; equal sizes give the balance loss of Switch.
    """

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, _loss)


def _loss(stack: Stack) -> Tensor:
    return stack.n_experts * (stack.mean(stack.selected) * stack.costs * stack.mean(stack.probs)).sum(-1)
