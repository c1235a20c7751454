"""The fused MoLoRA product: one product with the first factors, then one per linear, with a hand-written backward.

A site computes ``y = W0 x + B_cat ((A_cat x) * g)``, where g repeats every expert's weight (times its scale) over its
ranks. `down` multiplies x once by the A rows of all experts and the router's rows, for all sites that read x; `up` adds
the weighted results to the frozen outputs in place. Between them the selector is ordinary autograd code on ``[N, E]``
numbers, so every selector gets the fast path.

The pair shares a `_Cell`: `up` leaves the frozen layers' input gradient there and `down`, which autograd always runs
later, adds its own product into it with one ``addmm_``. So x gets one gradient tensor, as from one function.

Adapter weights are float32 masters that are cast to x's dtype per call, and once more in the backward. What is cheap to
make again is not kept, x included where it comes from a norm or an activation (`molehill.molora.recompute`).

How the rank axis is split between experts is one matrix, ``spread [E, R]``: row e holds expert e's scale on its own
ranks and 0 elsewhere, so ``weights @ spread`` is the g above. With that, every weighting is one dense product, which
costs less than broadcasting over the ranks of an expert.

Weights may have a leading client axis (``A [C, R, d_in]``, ``gate [C, G, d_in]``, ``Bt [C, R, d_out]``): rows of x are
then C equal runs, one per client. The frozen products still cover all rows at once, the low-rank ones are batched.

Shapes: N tokens, R sum of ranks of a site, E experts, G router rows, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Rows are those of A of every site, then those of every router; the first ``n_A`` of the weights are A's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cell: _Cell, source: Source | None, n_A: int, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = sum(A.shape[-2] for A in weights[:n_A])
        low = _matmul(x, _joined(weights, x.dtype).mT)
        kept: tuple[Tensor, ...] = (x,)
        ctx.recipe = None
        if source is not None and any(ctx.needs_input_grad[4:]):
            ctx.recipe, kept = source.recipe, source.inputs
            ctx.recipe.readers += 1
        ctx.save_for_backward(*weights, *kept)
        ctx.cell, ctx.rows, ctx.counts, ctx.like = cell, rows, (n_A, len(weights)), (x.shape[0], x.dtype)
        ctx.set_materialize_grads(False)
        return low[:, :rows], low[:, rows:].to(weights[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_low: Tensor | None, g_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        (n_A, n), (tokens, dtype) = ctx.counts, ctx.like
        weights, kept = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        cell, rows = ctx.cell, ctx.rows
        grad, gx = cell.low, cell.gx
        cell.low = cell.gx = None
        if grad is None:  # `up` had another input, or nobody used h
            total = sum(weight.shape[-2] for weight in weights)
            grad = torch.zeros(tokens, total, dtype=dtype, device=weights[0].device)
        if g_low is not None and g_low.data_ptr() != grad.data_ptr():
            grad[:, :rows] = g_low
        if g_logits is None:
            grad[:, rows:].zero_()
        else:
            grad[:, rows:].copy_(g_logits)
        g_weights: list[Tensor | None] = [None] * n
        needed = ctx.needs_input_grad[4:]
        if any(needed):
            x = kept[0] if ctx.recipe is None else ctx.recipe.make(tuple(kept))[1].detach().flatten(0, -2)
            first = 0 if any(needed[:n_A]) else n_A  # where only routers learn, the rows of A need no product
            own = grad if first == 0 else grad[:, rows:]
            made = _outer(own, x, weights[0]).to(weights[0].dtype)
            parts = torch.split(made, [weight.shape[-2] for weight in weights[first:]], -2)
            g_weights[first:] = [part if need else None for part, need in zip(parts, needed[first:], strict=True)]
        if ctx.needs_input_grad[0]:
            gx = _matmul(grad, _joined(weights, dtype), onto=gx)
        return gx, None, None, None, *g_weights


class Output(NamedTuple):
    """One linear on top of the projection.

    Attributes:
        W: Frozen weight ``[d_out, d_in]``.
        bias: Frozen bias ``[d_out]`` or None.
        weights: Expert weights ``[N, E]`` float32.
        Bt: ``[R, d_out]`` float32, the transposes of all B, or ``[C, R, d_out]``.
        spread: Scaled ranks of every expert, ``[E, R]`` float32.
    """

    W: Tensor
    bias: Tensor | None
    weights: Tensor
    Bt: Tensor
    spread: Tensor


_FIELDS = len(Output._fields)
_WEIGHTS, _BT = (Output._fields.index(name) for name in ("weights", "Bt"))


class _Up(torch.autograd.Function):
    """Tensors are the fields of every `Output`, one after another."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, cell: _Cell | None, gate_rows: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, kept, at = [], [], 0
        for W, bias, weights, Bt, spread in _outputs(tensors):
            y, rows = F.linear(x, W, bias), Bt.shape[-2]
            _matmul(low[:, at : at + rows] * (weights @ spread).to(x.dtype), Bt.to(x.dtype), onto=y)
            at += rows
            ys.append(y)
            kept += [W, weights, Bt, spread]
        ctx.save_for_backward(low, *kept)
        ctx.cell, ctx.gate_rows = cell, gate_rows
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        low, *kept = ctx.saved_tensors
        cell, needs = ctx.cell, ctx.needs_input_grad
        need_x, need_low = needs[:2]
        width = low.shape[1]
        # room for the router's rows, so that `down` has one operand for all of its products
        buffer = low.new_empty(low.shape[0], width + ctx.gate_rows) if need_low else None
        gx: Tensor | None = None
        grads: list[Tensor | None] = []
        at = 0
        for index, given in enumerate(gys):
            W, weights, Bt, spread = kept[4 * index : 4 * index + 4]
            need = needs[4 + _FIELDS * index : 4 + _FIELDS * (index + 1)]
            span = slice(at, at + Bt.shape[-2])
            at = span.stop
            own: list[Tensor | None] = [None] * _FIELDS
            grads_of_low = None if buffer is None else buffer[:, span]
            if given is None:  # nobody used this output
                if grads_of_low is not None:
                    grads_of_low.zero_()
            else:
                gy = given.contiguous()
                own[_WEIGHTS], own[_BT] = _small(gy, low[:, span], weights, Bt, spread, grads_of_low, need)
                if need_x:
                    gx = gy @ W if gx is None else gx.addmm_(gy, W)
            grads += own
        if cell is not None and buffer is not None:
            cell.low = buffer
            cell.gx, gx = gx, None
        return gx, None if buffer is None else buffer[:, :width], None, None, *grads


def _small(
    gy: Tensor,
    low: Tensor,
    weights: Tensor,
    Bt: Tensor,
    spread: Tensor,
    g_low: Tensor | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of one output's weights and Bt; that of low is written into ``g_low``."""
    bt, gates = Bt.to(gy.dtype), (weights @ spread).to(gy.dtype)
    g_B = _outer(low * gates, gy, bt).to(Bt.dtype) if need[_BT] else None
    if g_low is None and not need[_WEIGHTS]:
        return None, g_B
    q = _matmul(gy, bt.mT)
    g_w = (q * low).to(spread.dtype) @ spread.t() if need[_WEIGHTS] else None
    if g_low is not None:
        torch.mul(q, gates, out=g_low)
    return g_w, g_B


def _outputs(tensors: Sequence[Tensor | None]) -> list[Output]:
    return [Output(*tensors[at : at + _FIELDS]) for at in range(0, len(tensors), _FIELDS)]  # type: ignore[arg-type]  # only a bias may be None


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all under each other, in ``dtype``."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    counts = [weight.shape[-2] for weight in weights]
    first = weights[0]
    joined = torch.empty((*first.shape[:-2], sum(counts), first.shape[-1]), dtype=dtype, device=first.device)
    for part, weight in zip(torch.split(joined, counts, -2), weights, strict=True):
        part.copy_(weight)
    return joined


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


def down(
    x: Tensor, factors: Sequence[Tensor], gates: Sequence[Tensor] = (), source: Source | None = None
) -> Projection:
    """Project tokens on the A rows of all experts of all sites that read them and on routers' rows, in one product.

    Args:
        x: Tokens ``[N, d_in]``.
        factors: A of every site, ``[R, d_in]`` float32 or ``[C, R, d_in]``; one or more.
        gates: Router rows ``[G, d_in]`` float32, or ``[C, G, d_in]``; of as many routers as have no route yet.
        source: How x was made (before its leading axes were joined), when the backward is to make it again.

    Returns:
        ``A x`` of all sites side by side, the logits of all routers in float32, and the cell for `up`.
    """
    cell = _Cell()
    low, logits = _Down.apply(x, cell, source, len(factors), *factors, *gates)  # type: ignore[no-untyped-call]  # untyped torch
    return Projection(low, logits, cell)


def up(x: Tensor, projection: Projection, outputs: Sequence[Output], *, same_input: bool = True) -> tuple[Tensor, ...]:
    """The frozen outputs plus the weighted sums of experts.

    Args:
        x: Tokens ``[N, d_in]``.
        projection: From `down`.
        outputs: The linears, in the order of the factors there.
        same_input: False when `down` saw another tensor than ``x`` (adapter dropout).

    Returns:
        ``[N, d_out]`` of every linear.
    """
    cell = projection.cell if same_input else None
    tensors = [tensor for output in outputs for tensor in output]
    ys: tuple[Tensor, ...] = _Up.apply(x, projection.low, cell, projection.logits.shape[1], *tensors)  # type: ignore[no-untyped-call]  # untyped torch
    return ys
