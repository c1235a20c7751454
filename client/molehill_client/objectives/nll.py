"""Negative log-likelihood that keeps nothing of the size of the logits for its backward but the logits themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 2**20  # logits that are turned into float32 together: 4 MiB, which a processor's cache holds


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = torch.cat([z.logsumexp(1) for _, z in _parts(logits)])
        ctx.save_for_backward(logits, labels, total)
        return total - logits.gather(1, labels.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, total = ctx.saved_tensors
        columns = [part.unsqueeze(1) for part in (labels, total, grad)]
        g_logits = torch.empty_like(logits)
        for at, z in _parts(logits):
            label, sum_, column = (part[at] for part in columns)
            p = torch.sub(z, sum_).exp_().mul_(column)
            g_logits[at] = p.scatter_add_(1, label, -column)
        return g_logits, None


def _parts(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows, in float32 at least."""
    step = max(1, _AT_ONCE // logits.shape[1])
    for start in range(0, max(1, len(logits)), step):
        at = slice(start, start + step)
        yield at, logits[at].to(torch.promote_types(logits.dtype, torch.float32))


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log p(label)`` of every prediction.

    ``F.cross_entropy`` gives the same from float32 logits. It keeps their log-softmax, and in its backward makes two
    tensors of that size, one of them zero but for one number a row.

    Args:
        logits: ``[M, C]``; of any floating type, the arithmetic is float32 (float64 for float64).
        labels: ``[M]`` int64.

    Returns:
        ``[M]``.
    """
    return _NLL.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch
