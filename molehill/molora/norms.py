"""The gradient of RMS norms in one kernel.

Written in several operations, an RMS norm has a backward pass of a dozen, each over a tensor as large as its input.
Its gradient is that of a layer norm whose mean is zero, for which torch has a kernel, but for what a layer norm takes
off because its mean follows the input. The forward pass stays the module's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSForm(NamedTuple):
    """How a norm computes ``(offset + weight) * x / sqrt(mean(x^2) + eps)``.

    Attributes:
        offset: 1 where the weight is the difference from one, 0 elsewhere.
        eps: Added to the mean square.
    """

    offset: float
    eps: float


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: RMSForm, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = form
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _gradient(grad, x, weight, ctx.form), None, None, None


def rms_norm(x: Tensor, weight: Tensor, form: RMSForm, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(x)`` of an RMS norm, with a gradient for x that keeps x alone.

    Args:
        x: ``[..., d]``.
        weight: ``[d]``, frozen.
        form: From `form_of`.
        function: The norm's own forward pass.

    Returns:
        ``[..., d]``.
    """
    return _RMSNorm.apply(x, weight, form, function)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, form: RMSForm) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    size = x.shape[-1]
    scale = weight.to(wide) + form.offset
    z, g = x.reshape(-1, size).to(wide), grad.reshape(-1, size).to(wide)
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    inverse = length.square_().div_(size).add_(form.eps).rsqrt_()
    mean = torch.zeros_like(inverse)
    gx, _, _ = torch.ops.aten.native_layer_norm_backward(
        g, z, (size,), mean, inverse, scale, None, [True, False, False]
    )
    moved = (g @ scale).unsqueeze(1).mul_(inverse).div_(size)  # by the mean of a layer norm, which is none of ours
    return gx.add_(moved).to(x.dtype).view_as(x)  # type: ignore[no-any-return]  # untyped torch


def form_of(norm: nn.Module) -> RMSForm | None:
    """How an RMS norm on the CPU computes, by its gradient on three rows; None for any other module.

    One of the rows is so short that eps counts.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    x, probe = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    close = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for eps in {value for value in vars(norm).values() if isinstance(value, float) and 0 < value < 1}:
        rows = (x * torch.tensor([[1.0], [0.1], [eps**0.5]])).to(weight.dtype)
        try:
            with torch.enable_grad():
                y = norm(rows.requires_grad_())
                (expected,) = torch.autograd.grad(y, rows, probe)
        except Exception:  # noqa: BLE001  (it wants other arguments, or rows of another width)
            return None
        for offset in (0.0, 1.0):
            form = RMSForm(offset, eps)
            found = _gradient(probe, rows.detach(), weight.detach(), form)
            error = (found - expected).float().norm(dim=1)
            if y.dtype == rows.dtype and bool((error <= close * expected.float().norm(dim=1)).all()):
                return form
    return None
