"""LoHa: the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from molehill.molora.banks import Part
from molehill.molora.interfaces import InitStrategy, Site
from molehill.molora.products import ProductBank
from molehill.registry import register

_NAMES = ("w1a", "w1b", "w2a", "w2b")


@register(
    "expert",
    "loha",
    paper="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    url="https://arxiv.org/abs/2309.14859",
)
class LoHaBank(ProductBank):
    """``C_e = s (W1a W1b) * (W2a W2b)``, element by element: of rank up to r^2 for the numbers of rank 2r.

    W2b is 0 at first, the others are as Kaiming has them.

    Args:
        site: The adapted module.
        ranks: r of every expert, shared ones first.
        alpha: s is alpha over r.

    Attributes:
        w1a: The transposes of all W1a, ``[R, d_out]`` float32; w2a as well.
        w1b: All W1b, ``[R, d_in]``; w2b as well.
    """

    peft = "LOHA"

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__(site=site, ranks=ranks)
        self.alpha = alpha
        for name in _NAMES:
            width = site.d_out if name.endswith("a") else site.d_in
            self.register_parameter(name, nn.Parameter(torch.zeros(sum(ranks), width)))

    def _scale(self, expert: int) -> float:
        return self.alpha / self.ranks[expert] if self.alpha else 1.0

    def parts(self) -> Iterator[Part]:
        """``w1a`` and ``w2a [d_out, r]``, ``w1b`` and ``w2b [r, d_in]`` of every expert, the scale absorbed in w2a."""
        for name in _NAMES:
            for e in range(self.n_experts):
                scale = self._scale(e) if name == "w2a" else 1.0
                yield Part(name, f"dense.{name}", e, self.rows(e), transposed=name.endswith("a"), scale=scale)

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """See the class; the strategy is one for low-rank pairs and not asked."""
        del init
        for name in _NAMES[:3]:
            factor = self.get_parameter(name)
            bound = (self.ranks[expert] if name.endswith("a") else self.site.d_in) ** -0.5
            fresh = torch.rand(self.ranks[expert], factor.shape[1], generator=generator)
            factor[self.rows(expert)].copy_((2 * fresh - 1) * bound)

    def like(self, site: Site, ranks: tuple[int, ...]) -> LoHaBank:
        """See `Bank.like`."""
        return LoHaBank(site=site, ranks=ranks, alpha=0.0)

    def change(self, expert: int) -> Tensor:
        """See `ProductBank.change`."""
        w1a, w1b, w2a, w2b = (getattr(self, name)[self.rows(expert)] for name in _NAMES)
        made: Tensor = (w1a.t() @ w1b) * (w2a.t() @ w2b) * self._scale(expert)
        return made
