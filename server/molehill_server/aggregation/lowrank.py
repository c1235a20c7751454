"""Arithmetic on matrices given by low-rank factors; no ``d_out x d_in`` matrix is ever formed.

Factors are float32, the arithmetic is float64: differences of nearly equal products lose no digits to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from molehill.wire.tree import Array
from molehill_server.records import LowRank

EPS = float(np.finfo(np.float32).eps)
_SPARE = 8  # columns beyond those that matter
_ITERATIONS = 4


def concat(points: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """The weighted sum of products, as stacked factors ``[w_1 B_1 .. w_K B_K] [A_1; ..; A_K]``.

    Exact; weights of 1 copy bits (FLoRA, https://arxiv.org/abs/2409.05976).
    """
    weights = weights or [1.0] * len(points)
    return LowRank(
        np.concatenate([point.B * np.float32(w) for point, w in zip(points, weights, strict=True)], axis=1),
        np.concatenate([point.A for point in points], axis=0),
    )


def inner(p: LowRank, q: LowRank) -> float:
    """Frobenius inner product of two products, ``tr((B_p^T B_q)(A_q A_p^T))``; work ``R_p R_q (d_out + d_in)``."""
    b = _wide(p.B).T @ _wide(q.B)  # [R_p, R_q]
    a = _wide(p.A) @ _wide(q.A).T
    return float((b * a).sum())


def norm(p: LowRank) -> float:
    """Frobenius norm of the product."""
    return float(np.sqrt(max(inner(p, p), 0.0)))


def distance(p: LowRank, q: LowRank) -> float:
    """Frobenius norm of the difference of two products."""
    return norm(concat([p, q], [1.0, -1.0]))


def gram(points: Sequence[LowRank]) -> NDArray[np.float64]:
    """``[K, K]`` inner products of K products; it does not depend on how each one is factored.

    Two products of the stacked factors, ``[sum R, sum R]`` each, hold all terms of `inner` for all pairs.
    """
    b = _wide(np.concatenate([point.B for point in points], axis=1))
    a = _wide(np.concatenate([point.A for point in points], axis=0))
    owner = torch.repeat_interleave(torch.eye(len(points), dtype=torch.float64), _ranks(points), dim=0)  # [sum R, K]
    out: NDArray[np.float64] = (owner.T @ ((b.T @ b) * (a @ a.T)) @ owner).numpy()
    return out


def squared_distances(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[K, K]`` squared distances of K points from their inner products."""
    size = np.diag(gram)
    return np.maximum(size[:, None] + size - gram - gram.T, 0.0)


def svd(p: LowRank) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Thin singular value decomposition ``U diag(s) V`` of the product by QR of both factors.

    With ``B = Q_b R_b`` and ``A^T = Q_a R_a`` it is the SVD of the small core ``R_b R_a^T``; ranks above ``d_out`` or
    ``d_in`` are fine. Signs are fixed: the largest entry of every row of V is positive.

    Args:
        p: Factors of rank R.

    Returns:
        U ``[d_out, n]``, s ``[n]`` falling, V ``[n, d_in]``, with n = min(R, d_out, d_in).
    """
    qb, rb = torch.linalg.qr(_wide(p.B))
    qa, ra = torch.linalg.qr(_wide(p.A).T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    left, right = (u.T @ qb.T).T.contiguous(), v @ qa.T  # Q comes by columns: Q U would take 8 times as long
    peak = right.gather(1, right.abs().argmax(dim=1, keepdim=True))  # [n, 1]
    sign = torch.where(peak < 0, -1.0, 1.0)
    return (left * sign.T).numpy(), s.numpy(), (right * sign).numpy()


def compress(p: LowRank, floor: float = 0.0) -> LowRank:
    """The same product with as few columns as it has singular values above ``floor``; B carries the values."""
    u, s, v = svd(p)
    keep = int((s > max(floor, EPS * s[:1].sum())).sum())
    return LowRank((u[:, :keep] * s[:keep]).astype(np.float32), v[:keep].astype(np.float32))


def approximate(matrix: Array, rank: int) -> tuple[LowRank, float]:
    """A dense matrix as factors of ``rank`` and a few more columns, and the norm of what they lack.

    Subspace iteration from a fixed random start (Halko, Martinsson & Tropp 2011, https://arxiv.org/abs/0909.4061,
    algorithm 4.4): the first ``rank`` singular directions are those of the matrix to within rounding unless the ones
    after them are equally strong, and a matrix of lower rank, or with few rows or columns, comes back exactly.

    Args:
        matrix: ``[d_out, d_in]``.
        rank: Directions that matter.

    Returns:
        Factors, and the Frobenius norm of the difference, which is at right angles to their product.
    """
    wide = _wide(matrix)
    columns = min(*wide.shape, rank + _SPARE)
    start = torch.randn(wide.shape[1], columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(wide @ start)
    for _ in range(_ITERATIONS):
        turned, _ = torch.linalg.qr(wide.T @ basis)
        basis, _ = torch.linalg.qr(wide @ turned)
    core = basis.T @ wide
    tail = float(wide.square().sum() - core.square().sum())
    return LowRank(basis.numpy().astype(np.float32), core.numpy().astype(np.float32)), max(tail, 0.0) ** 0.5


def fold(p: LowRank) -> LowRank:
    """``p`` itself, or the same product with min(d_out, d_in) columns when it has more than that."""
    return compress(p) if p.rank > min(p.shape) else p


def _ranks(points: Sequence[LowRank]) -> torch.Tensor:
    return torch.tensor([point.rank for point in points])


def _wide(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))
