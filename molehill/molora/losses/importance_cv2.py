"""The importance loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@register(
    "routing_loss",
    "importance_cv2",
    paper="Shazeer et al. 2017, Outrageously Large Neural Networks",
    url="https://arxiv.org/abs/1701.06538",
)
class ImportanceCV2(RoutingLoss):
    """Squared coefficient of variation of the experts' gate mass; 0 when all carry the same."""

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, _loss)


def _loss(stack: Stack) -> Tensor:
    mass = stack.mean(stack.weights)
    return cv2(mass, torch.ones_like(mass))


def cv2(values: Tensor, counted: Tensor) -> Tensor:
    """Return the population variance over the squared mean.

    Args:
        values: ``[R, N]``.
        counted: 1 for the values that count, else 0, same shape.

    Returns:
        One value per row, ``[R]``.
    """
    n = counted.sum(-1, keepdim=True).clamp_min(1)
    mean = (values * counted).sum(-1, keepdim=True) / n
    variance = ((values - mean).square() * counted).sum(-1, keepdim=True) / n
    return (variance / (mean.square() + 1e-10)).squeeze(-1)
