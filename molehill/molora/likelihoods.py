"""How likely labels are, given what a model says of them: one function for each kind of prediction.

Each takes scores ``[M, C]`` and labels and returns ``-log p(label)`` of every prediction, ``[M]``, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Likelihood: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_AT_ONCE = 2**18  # logits that are turned into float32 together: 1 MiB, which a processor's cache holds


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = logits.new_empty(len(logits), dtype=wide)
        slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for at in _parts(logits):
            label = labels[at].unsqueeze(1)
            p = torch.softmax(logits[at], -1, dtype=wide)
            own = p.gather(1, label)
            loss[at] = own.log().neg_().squeeze(1)
            if slope is not None:
                slope[at] = p.scatter_(1, label, own - 1)
        rare = (loss > -0.9 * math.log(torch.finfo(wide).tiny)).nonzero().squeeze(1)
        if len(rare):  # their probability is too small a number to take a logarithm of
            z = logits[rare].to(wide)
            loss[rare] = z.logsumexp(1) - z.gather(1, labels[rare].unsqueeze(1)).squeeze(1)
        if slope is not None:
            ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        if len(grad) and bool((grad == grad[0]).all()):  # of a mean
            return slope * grad[0], None
        g_logits = torch.empty_like(slope)
        for at in _parts(slope):
            torch.mul(slope[at], grad[at].unsqueeze(1), out=g_logits[at])
        return g_logits, None


def _parts(logits: Tensor) -> list[slice]:
    """Runs of rows."""
    step = max(1, _AT_ONCE // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Of one of several classes, with one softmax whose gradient is all that is kept.

    ``F.cross_entropy`` gives the same from float32 logits. It keeps their log-softmax, and in its backward makes two
    tensors of that size, one of them zero but for one number a row.

    Args:
        logits: ``[M, C]``; of any floating type, the arithmetic is float32 (float64 for float64).
        labels: ``[M]`` int64.

    Returns:
        ``[M]``.
    """
    return _NLL.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch


def of_flags(logits: Tensor, labels: Tensor) -> Tensor:
    """Of any number of classes, each there or not by itself: the mean over the classes.

    Args:
        logits: ``[M, C]``.
        labels: ``[M, C]``, 1 where a class is there and 0 where it is not.

    Returns:
        ``[M]``.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="none").mean(-1)


def of_number(scores: Tensor, labels: Tensor) -> Tensor:
    """Of a number under a normal distribution of variance 1, without its constant: half the squared error.

    Args:
        scores: ``[M, 1]``.
        labels: ``[M]``, in the same unit.

    Returns:
        ``[M]``.
    """
    wide = scores.squeeze(-1).to(torch.promote_types(scores.dtype, torch.float32))
    return (wide - labels.to(wide.dtype)).square() / 2
