"""LoRA experts that each have a vector, which can stand for them at the input of others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from molehill.molora.banks import Bank, PairBank, Part
from molehill.molora.interfaces import InitStrategy, Site
from molehill.registry import register

_ROLES = {"A": "dense.down", "B": "dense.up"}


@register(
    "expert",
    "compressed",
    paper="He et al. 2025, Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    url="https://arxiv.org/abs/2503.00634",
    seeds=("S81",),
)
class CompressedBank(Bank):
    """``delta_e(x) = (alpha / r_e) B_e A_e x``, and a vector c_e, 1 at first, for the mixer ``compressed``.

    With any other mixer it is LoRA, and the vectors learn nothing.

    Args:
        site: The adapted module.
        ranks: Rank of every expert, shared ones first.
        alpha: LoRA alpha.

    Attributes:
        pairs: The LoRAs.
        vector: All ``c - 1``, ``[E, d_in]`` float32.
    """

    noun, size = "compressible LoRA", "rank"
    modulates = True

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__(site=site, ranks=ranks)
        self.pairs = PairBank(site=site, ranks=ranks, scales=tuple(alpha / rank for rank in ranks))
        self.vector = nn.Parameter(torch.zeros(len(ranks), site.d_in))

    def parts(self) -> Iterator[Part]:
        """``down [r, d_in]``, ``up [d_out, r]`` with the scale in it, and ``vector [1, d_in]`` of every expert."""
        for part in self.pairs.parts():
            yield part._replace(parameter=f"pairs.{part.parameter}", role=_ROLES[part.role])
        for e in range(self.n_experts):
            yield Part("vector", "dense.vector", e, slice(e, e + 1))

    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """The LoRA as the strategy says; c is 1."""
        self.pairs.start(expert, init, generator)

    def like(self, site: Site, ranks: tuple[int, ...]) -> CompressedBank:
        """See `Bank.like`."""
        other = CompressedBank(site=site, ranks=ranks, alpha=1.0)
        other.pairs = self.pairs.like(site, ranks)
        return other

    def modulation(self, weights: Tensor) -> Tensor:
        """See `molehill.molora.banks.Modulates`."""
        return 1 + weights @ self.vector

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`; the frozen output is not used."""
        return self.pairs.delta(x, y0, weights)

    def outputs(self, x: Tensor, y0: Tensor) -> Tensor:
        """See `Bank.outputs`."""
        return self.pairs.outputs(x, y0)

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """That of the LoRA: an expert by itself is multiplied by nobody's vector."""
        return self.pairs.weight(expert)
