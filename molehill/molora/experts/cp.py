"""Experts that are slices of one tensor in factors, so that one more costs a row of numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehill.molora.banks import Bank, Part
from molehill.molora.interfaces import InitStrategy, Site
from molehill.registry import register


@register(
    "expert",
    "cp",
    paper="Oldfield et al. 2024, Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization",
    url="https://arxiv.org/abs/2402.12550",
    seeds=("S78",),
)
class CPBank(Bank):
    """``delta_e(x) = U (f_e * (D x))``: all weights ``[E, d_out, d_in]`` are one tensor of CP rank R.

    D and U are of all experts and averaged over all clients whatever their tokens; f_e ``[R]`` alone is the expert's,
    so that hundreds cost little. f starts as N(1, 1), D as the A of a LoRA, U at 0.

    Differs from the paper: it is a change of a frozen linear and not a layer of its own; of its two factorisations
    there is CP, without the tensor ring; and experts have one level.

    Args:
        site: The adapted module.
        ranks: R is the largest of them.
        alpha: Not used; there is no scale.

    Attributes:
        f: ``[E, R]`` float32.
        down: D, ``[R, d_in]``.
        up: The transpose of U, ``[R, d_out]``.
    """

    noun, size = "slice", "CP rank"

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        del alpha
        rank = max(ranks)
        super().__init__(site=site, ranks=(rank,) * len(ranks))
        self.f = nn.Parameter(torch.zeros(len(ranks), rank))
        self.down = nn.Parameter(torch.zeros(rank, site.d_in))
        self.up = nn.Parameter(torch.zeros(rank, site.d_out))

    def parts(self) -> Iterator[Part]:
        """``f [1, R]`` of every expert; ``down [R, d_in]`` and ``up [R, d_out]`` of all."""
        for e in range(self.n_experts):
            yield Part("f", "dense.f", e, slice(e, e + 1))
        for name in ("down", "up"):
            yield Part(name, f"dense.{name}", None, slice(0, len(self.down)))

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """See the class; D starts with the first expert."""
        if expert == 0:
            init(self.down, torch.zeros(self.site.d_out, len(self.down)), generator)
        self.f[expert] = 1 + torch.randn(self.f.shape[1], generator=generator)

    def like(self, site: Site, ranks: tuple[int, ...]) -> CPBank:
        """See `Bank.like`; the rank stays that of the factors, which are of all experts."""
        return CPBank(site=site, ranks=(len(self.down),) * len(ranks), alpha=1.0)

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`; the experts' f are mixed before anything is multiplied, so their number costs little."""
        return (F.linear(x, self.down.to(x.dtype)) * (weights @ self.f).to(x.dtype)) @ self.up.to(x.dtype)

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """A slice of the tensor."""
        return (self.up * self.f[expert].unsqueeze(-1)).t() @ self.down, None
