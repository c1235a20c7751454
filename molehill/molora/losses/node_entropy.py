"""Hardening of the decisions in a tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.molora.trees import masses
from molehill.registry import register

_LEAST = 1e-12  # of a probability, so that its logarithm has a gradient


@register(
    "routing_loss",
    "node_entropy",
    paper="Belcak and Wattenhofer 2023, Fast Feedforward Networks",
    url="https://arxiv.org/abs/2308.14711",
)
class NodeEntropy(RoutingLoss):
    """The mean entropy of the decisions at the nodes, in nats: towards ways that are as clear as at inference."""

    ordered = True

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        mass, n = masses(stack.probs), stack.n_experts
        if n == 1:  # there is nothing to decide
            return stack.mean(stack.probs[..., 0] * 0.0)
        sides = [mass[side] / mass[side // 2].clamp_min(_LEAST) for side in range(2, 2 * n)]
        decided = torch.stack(sides, -1).clamp(_LEAST, 1.0)
        return stack.mean(-(decided * decided.log()).sum(-1) / (n - 1))
