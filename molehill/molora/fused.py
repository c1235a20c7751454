"""The fused MoLoRA product: two GEMMs over the partitioned rank axis, with a hand-written backward.

A site computes ``y = W0 x + B_cat ((A_cat x) * g)``, where g repeats every expert's weight (times its scale) over its
ranks. `down` multiplies x once by the A rows of all experts and the router's rows; `up` adds the weighted result to
the frozen output in place. Between them the selector is ordinary autograd code on ``[N, E]`` numbers, so every
selector gets the fast path.

The pair shares a `_Cell`: `up` leaves the frozen layer's input gradient there and `down`, which autograd always runs
later, adds its own product into it with one ``addmm_``. So x gets one gradient tensor, as from one function.

Adapter weights are float32 masters that are cast to x's dtype per call, and once more in the backward. What is cheap to
make again is not kept, x included where it comes from a norm or an activation (`molehill.molora.recompute`).
`reference` is the same maths in plain autograd and serves as the oracle.

How the rank axis is split between experts is one matrix, ``spread [E, R]``: row e holds expert e's scale on its own
ranks and 0 elsewhere, so ``weights @ spread`` is the g above. With that, every weighting is one dense product, which
costs less than broadcasting over the ranks of an expert.

Weights may have a leading client axis (``A [C, R, d_in]``, ``gate [C, G, d_in]``, ``Bt [C, R, d_out]``): rows of x are
then C equal runs, one per client. The frozen product still covers all rows at once, the low-rank ones are batched.

Shapes: N tokens, R sum of ranks, E experts, G router rows, C clients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from molehill.molora.recompute import Source


class _Cell:
    """Carries gradients from `_Up.backward` to `_Down.backward` of the same call."""

    __slots__ = ("gx", "low")

    def __init__(self) -> None:
        self.gx: Tensor | None = None
        self.low: Tensor | None = None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, gate: Tensor | None, cell: _Cell, source: Source | None
    ) -> tuple[Tensor, Tensor]:
        rows = A.shape[-2]
        low = _matmul(x, _joined(A, gate, x.dtype).mT)
        kept: tuple[Tensor, ...] = (x,)
        ctx.recipe = None
        if source is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            ctx.recipe, kept = source.recipe, source.inputs
            ctx.recipe.readers += 1
        ctx.save_for_backward(A, gate, *kept)
        ctx.cell, ctx.rows, ctx.has_gate, ctx.tokens, ctx.dtype = cell, rows, gate is not None, x.shape[0], x.dtype
        ctx.set_materialize_grads(False)
        return low[:, :rows], low[:, rows:].to(A.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_low: Tensor | None, g_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        A, gate, *kept = ctx.saved_tensors
        weight = _joined(A, gate, ctx.dtype)
        cell, rows = ctx.cell, ctx.rows
        grad, gx = cell.low, cell.gx
        cell.low = cell.gx = None
        if grad is None:  # `up` had another input, or nobody used h
            grad = torch.zeros(ctx.tokens, weight.shape[-2], dtype=weight.dtype, device=weight.device)
        if g_low is not None and g_low.data_ptr() != grad.data_ptr():
            grad[:, :rows] = g_low
        if ctx.has_gate:
            if g_logits is None:
                grad[:, rows:].zero_()
            else:
                grad[:, rows:].copy_(g_logits)
        g_weight = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = kept[0] if ctx.recipe is None else ctx.recipe.make(tuple(kept))[1].detach().flatten(0, -2)
            g_weight = _outer(grad, x, weight).to(A.dtype)
        gx = _matmul(grad, weight, onto=gx) if ctx.needs_input_grad[0] else None
        g_A = g_weight[..., :rows, :] if g_weight is not None and ctx.needs_input_grad[1] else None
        g_gate = g_weight[..., rows:, :] if g_weight is not None and ctx.needs_input_grad[2] else None
        return gx, g_A, g_gate, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        low: Tensor,
        weights: Tensor,
        Bt: Tensor,
        spread: Tensor,
        cell: _Cell | None,
        gate_rows: int,
    ) -> Tensor:
        y = F.linear(x, W, bias)
        _matmul(low * (weights @ spread).to(x.dtype), Bt.to(x.dtype), onto=y)
        ctx.save_for_backward(W, low, weights, Bt, spread)
        ctx.cell, ctx.gate_rows = cell, gate_rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        W, low, weights, Bt, spread = ctx.saved_tensors
        cell = ctx.cell
        gy = gy.contiguous()
        bt = Bt.to(gy.dtype)
        need_x, need_low, need_w, need_B = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
        g_B = g_low = g_w = None
        gates = (weights @ spread).to(gy.dtype)
        if need_B:
            g_B = _outer(low * gates, gy, bt).to(Bt.dtype)
        if need_low or need_w:
            q = _matmul(gy, bt.mT)
            if need_w:
                g_w = (q * low).to(spread.dtype) @ spread.t()
            if need_low:
                # room for the router's rows, so that `down` has one operand for all of its products
                buffer = torch.empty(q.shape[0], q.shape[1] + ctx.gate_rows, dtype=q.dtype, device=q.device)
                g_low = torch.mul(q, gates, out=buffer[:, : q.shape[1]])
                if cell is not None:
                    cell.low = buffer
        gx = gy @ W if need_x else None
        if cell is not None and need_low:
            cell.gx, gx = gx, None
        return gx, None, None, g_low, g_w, g_B, None, None, None


def _joined(A: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of A and of the router under each other, in ``dtype``."""
    if gate is None:
        return A.to(dtype)
    rows = A.shape[-2]
    weight = torch.empty((*A.shape[:-2], rows + gate.shape[-2], A.shape[-1]), dtype=dtype, device=A.device)
    weight[..., :rows, :].copy_(A)
    weight[..., rows:, :].copy_(gate)
    return weight


def _matmul(rows: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """``rows [N, k] @ weight [k, m]``, each client's rows by its own ``[C, k, m]``; added to ``onto`` when given."""
    if weight.dim() == 2:
        return rows @ weight if onto is None else onto.addmm_(rows, weight)
    if onto is None:
        return torch.bmm(_by_client(rows, weight), weight).flatten(0, 1)
    _by_client(onto, weight).baddbmm_(_by_client(rows, weight), weight)
    return onto


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """``left.T @ right`` summed over tokens, or over each client's own when ``like`` has a client axis."""
    if like.dim() == 2:
        return left.t() @ right
    return torch.bmm(_by_client(left, like).mT, _by_client(right, like))


def _by_client(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(like.shape[0], -1, rows.shape[-1])


class Projection(NamedTuple):
    """What `down` hands to `up`: low-rank activations ``[N, R]``, logits ``[N, G]`` and the shared cell."""

    low: Tensor
    logits: Tensor
    cell: _Cell


def down(x: Tensor, A: Tensor, gate: Tensor | None, source: Source | None = None) -> Projection:
    """Project tokens on the A rows of all experts and on the router's rows, in one GEMM.

    Args:
        x: Tokens ``[N, d_in]``.
        A: ``[R, d_in]`` float32, or ``[C, R, d_in]``.
        gate: Router rows ``[G, d_in]`` float32, or ``[C, G, d_in]``; None when the route comes from elsewhere.
        source: How x was made (before its leading axes were joined), when the backward is to make it again.

    Returns:
        ``A x``, the logits in float32, and the cell for `up`.
    """
    cell = _Cell()
    low, logits = _Down.apply(x, A, gate, cell, source)  # type: ignore[no-untyped-call]  # untyped torch
    return Projection(low, logits, cell)


def up(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    projection: Projection,
    weights: Tensor,
    Bt: Tensor,
    spread: Tensor,
    *,
    same_input: bool = True,
) -> Tensor:
    """The frozen output plus the weighted sum of experts.

    Args:
        x: Tokens ``[N, d_in]``.
        W: Frozen weight ``[d_out, d_in]``.
        bias: Frozen bias ``[d_out]`` or None.
        projection: From `down`.
        weights: Expert weights ``[N, E]`` float32.
        Bt: ``[R, d_out]`` float32, the transposes of all B, or ``[C, R, d_out]``.
        spread: Scaled ranks of every expert, ``[E, R]`` float32.
        same_input: False when `down` saw another tensor than ``x`` (adapter dropout).

    Returns:
        ``[N, d_out]``.
    """
    cell = projection.cell if same_input else None
    gate_rows = projection.logits.shape[1]
    y: Tensor = _Up.apply(x, W, bias, projection.low, weights, Bt, spread, cell, gate_rows)  # type: ignore[no-untyped-call]  # untyped torch
    return y
