"""Negative log-likelihood that keeps one tensor of the size of the logits for its backward, and makes one there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1)
        ctx.save_for_backward(log_p, labels)
        return -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p, labels = ctx.saved_tensors
        column = grad.unsqueeze(1)
        return log_p.exp().mul_(column).scatter_add_(1, labels.unsqueeze(1), -column), None


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log p(label)`` of every prediction.

    ``F.cross_entropy`` gives the same, and in its backward a second tensor of the size of the logits that is zero but
    for one number a row.

    Args:
        logits: ``[M, C]``.
        labels: ``[M]`` int64.

    Returns:
        ``[M]``.
    """
    return _NLL.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]
