"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from molehill.molora.banks import Part
from molehill.molora.interfaces import InitStrategy, Site
from molehill.molora.products import ProductBank
from molehill.registry import register


@register(
    "expert",
    "lokr",
    paper="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    url="https://arxiv.org/abs/2309.14859",
)
class LoKrBank(ProductBank):
    """``C_e = s W1 (x) (W2a W2b)``: a pattern that is repeated over the matrix; few numbers, and a high rank.

    Both sides of the matrix are factored near their roots, W1 having the smaller factors. It is 0 at first, as in peft
    (LyCORIS itself has W2 so); the others are as Kaiming has them.

    Args:
        site: The adapted module.
        ranks: r of the second factor of every expert, shared ones first.
        alpha: s is alpha over r.

    Attributes:
        w1: All W1, ``[E m, n]`` float32, m n the smaller factors of ``d_out`` and ``d_in``.
        w2a: The transposes of all W2a, ``[R, d_out / m]``.
        w2b: All W2b, ``[R, d_in / n]``.
    """

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__(site=site, ranks=ranks)
        self.alpha = alpha
        (self.m, out), (n, into) = _factors(site.d_out), _factors(site.d_in)
        self.w1 = nn.Parameter(torch.zeros(len(ranks) * self.m, n))
        self.w2a = nn.Parameter(torch.zeros(sum(ranks), out))
        self.w2b = nn.Parameter(torch.zeros(sum(ranks), into))

    @property
    def peft(self) -> Literal["LOKR"] | None:  # type: ignore[override]  # peft keeps a second factor of a high rank whole
        """LoKr, where the rank is low enough for peft to keep two factors, too."""
        return "LOKR" if max(self.ranks) < max(self.w2a.shape[1], self.w2b.shape[1]) / 2 else None

    def _scale(self, expert: int) -> float:
        return self.alpha / self.ranks[expert] if self.alpha else 1.0

    def parts(self) -> Iterator[Part]:
        """``w1 [m, n]``, ``w2a [d_out / m, r]`` and ``w2b [r, d_in / n]`` of every expert, the scale in w2a."""
        for e in range(self.n_experts):
            yield Part("w1", "dense.w1", e, slice(e * self.m, (e + 1) * self.m))
        for e in range(self.n_experts):
            yield Part("w2a", "dense.w2a", e, self.rows(e), transposed=True, scale=self._scale(e))
        for e in range(self.n_experts):
            yield Part("w2b", "dense.w2b", e, self.rows(e))

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """See the class; the strategy is one for low-rank pairs and not asked."""
        del init
        for factor, bound in ((self.w2a, self.ranks[expert] ** -0.5), (self.w2b, self.w2b.shape[1] ** -0.5)):
            fresh = torch.rand(self.ranks[expert], factor.shape[1], generator=generator)
            factor[self.rows(expert)].copy_((2 * fresh - 1) * bound)

    def like(self, site: Site, ranks: tuple[int, ...]) -> LoKrBank:
        """See `Bank.like`."""
        return LoKrBank(site=site, ranks=ranks, alpha=0.0)

    def change(self, expert: int) -> Tensor:
        """See `ProductBank.change`."""
        rows = self.rows(expert)
        second = self.w2a[rows].t() @ self.w2b[rows]
        return torch.kron(self.w1[expert * self.m : (expert + 1) * self.m], second) * self._scale(expert)


def _factors(size: int) -> tuple[int, int]:
    """The two factors of a size that are nearest to each other, the smaller first."""
    small = next(each for each in range(int(size**0.5), 0, -1) if size % each == 0)
    return small, size // small
