"""Distributions over experts: softmax and its top-k form with a closed backward, and entropies.

``torch.softmax`` over a short last axis is slow on a CPU (it vectorises along that axis), and a routed model calls it
at every site. One closed-form backward, ``dz = w * (g - sum(w * g))``, serves the full and the top-k softmax alike,
since an unselected expert has w = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SHORT = 16  # axes at least this long fill a vector register, so that torch's own softmax is the faster one
_TINY = 1e-9


def softmax(z: Tensor) -> Tensor:
    """Return the softmax of logits ``[..., E]``, same shape."""
    if torch.is_grad_enabled() and z.requires_grad:
        return _Softmax.apply(z, None)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch
    return _softmax(z)


def top_k_softmax(z: Tensor, k: int) -> Tensor:
    """Return the softmax over the ``k`` largest logits of ``[..., E]``, and 0 for the others, same shape."""
    if torch.is_grad_enabled() and z.requires_grad:
        return _Softmax.apply(z, k)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch
    return _top_k_softmax(z, k)


def top_k_mask(z: Tensor, k: int) -> Tensor:
    """Return True for the ``k`` largest logits of ``[..., E]``; exactly k, ties broken by index."""
    index = z.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, index, value=True)


def shannon(p: Tensor) -> Tensor:
    """Return the Shannon entropy of ``[..., E]`` in nats, ``[...]``; 0 to ln E."""
    return -(p * p.clamp_min(_TINY).log()).sum(-1)


def tsallis(p: Tensor, q: float) -> Tensor:
    """Return the Tsallis entropy ``(1 - sum p^q) / (q - 1)`` of ``[..., E]`` over its largest value, ``[...]``.

    It is 1 for the uniform distribution and 0 for a certain one; q -> 1 is Shannon's over ln E. One expert alone is
    always certain.

    Args:
        p: Distributions.
        q: Order, positive and not 1.
    """
    n = p.shape[-1]
    if n == 1:
        return torch.zeros_like(p[..., 0])
    entropy: Tensor = (1 - p.clamp_min(_TINY).pow(q).sum(-1)) / (1 - n ** (1 - q))
    return entropy


def uncertainty(p: Tensor) -> Tensor:
    """Return the Shannon entropy of ``[..., E]`` over ln E, ``[...]``; 0 when there is one expert."""
    n = p.shape[-1]
    return shannon(p) / math.log(n) if n > 1 else torch.zeros_like(p[..., 0])


def _softmax(z: Tensor) -> Tensor:
    if z.is_cuda or z.shape[-1] >= _SHORT or torch.compiler.is_exporting():  # one node in an exported graph
        return z.softmax(-1)
    e = (z - z.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def _top_k_softmax(z: Tensor, k: int) -> Tensor:
    if k >= z.shape[-1]:
        return _softmax(z)
    value, index = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, index, _softmax(value))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int | None) -> Tensor:
        w = _softmax(z) if k is None else _top_k_softmax(z, k)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        wg = w * grad_outputs[0]
        return wg - w * wg.sum(-1, keepdim=True), None
