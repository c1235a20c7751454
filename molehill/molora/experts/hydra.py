"""Hydra: a LoRA beside the linear and one behind it."""

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
    "hydra",
    paper="Kim et al. 2023, Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
    url="https://arxiv.org/abs/2309.06922",
)
class HydraBank(Bank):
    """``delta_e = s (B_p A_p x + B_s A_s y0)``: new features of the input, and new mixtures of what the linear gives.

    At fixed weights it is another weight and bias, ``W + s (B_p A_p + B_s A_s W)`` and ``b + s B_s A_s b``.

    Args:
        site: The adapted module.
        ranks: Rank of both pairs of every expert, shared ones first.
        alpha: s is alpha over the rank.

    Attributes:
        pA: All A_p, ``[R, d_in]`` float32.
        pB: The transposes of all B_p, ``[R, d_out]``.
        sA: All A_s, ``[R, d_out]``.
        sB: The transposes of all B_s, ``[R, d_out]``.
        spread: An expert's scale where a rank belongs to it, ``[E, R]``.
    """

    noun, size = "pair of pairs", "rank"
    needs_output = True
    spread: Tensor

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__(site=site, ranks=ranks)
        self.alpha = alpha
        total = sum(ranks)
        self.pA, self.pB = nn.Parameter(torch.zeros(total, site.d_in)), nn.Parameter(torch.zeros(total, site.d_out))
        self.sA, self.sB = nn.Parameter(torch.zeros(total, site.d_out)), nn.Parameter(torch.zeros(total, site.d_out))
        owner = torch.tensor([e for e, rank in enumerate(ranks) for _ in range(rank)])
        scales = torch.tensor([self._scale(rank) for rank in ranks for _ in range(rank)])
        self.register_buffer("spread", F.one_hot(owner, len(ranks)).t() * scales, persistent=False)

    def _scale(self, rank: int) -> float:
        return self.alpha / rank if self.alpha else 1.0

    def parts(self) -> Iterator[Part]:
        """``pA [r, d_in]``, ``pB``, ``sA`` and ``sB [r, d_out]`` of every expert, the scale absorbed in both B."""
        for name in ("pA", "pB", "sA", "sB"):
            for e, rank in enumerate(self.ranks):
                scale = self._scale(rank) if name.endswith("B") else 1.0
                yield Part(name, f"dense.{name}", e, self.rows(e), scale=scale)

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """Both A as the strategy's, both B 0."""
        for A in (self.pA, self.sA):
            fresh = torch.zeros(self.ranks[expert], A.shape[1])
            init(fresh, torch.zeros(self.site.d_out, self.ranks[expert]), generator)
            A[self.rows(expert)].copy_(fresh)

    def like(self, site: Site, ranks: tuple[int, ...]) -> HydraBank:
        """See `Bank.like`."""
        return HydraBank(site=site, ranks=ranks, alpha=0.0)

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`."""
        gates = (weights @ self.spread).to(x.dtype)
        beside = (F.linear(x, self.pA.to(x.dtype)) * gates) @ self.pB.to(x.dtype)
        return beside + (F.linear(y0, self.sA.to(x.dtype)) * gates) @ self.sB.to(x.dtype)

    def folded(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Bank.folded`; any weights are another linear."""
        gates = (weights @ self.spread).unsqueeze(-1)
        beside, behind = (gates * self.pB).t() @ self.pA, (gates * self.sB).t() @ self.sA
        return weight + beside + behind @ weight, None if bias is None else bias + behind @ bias
