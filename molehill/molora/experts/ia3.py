"""Mixture of vectors: every expert rescales the frozen output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from molehill.molora.banks import Bank, Part
from molehill.molora.interfaces import Site
from molehill.registry import register


@register(
    "expert",
    "ia3",
    paper="Zadouri et al. 2023, Pushing Mixture of Experts to the Limit (MoV); Liu et al. 2022 (IA3)",
    url="https://arxiv.org/abs/2309.05444",
    seeds=("S13",),
)
class IA3Bank(Bank):
    """All (IA)3 vectors of one site.

    MoV is ``y = (sum_e w_e s_e) * y0`` with s_e = 1 at the start; as a delta on the frozen output this is
    ``(sum_e w_e v_e) * y0`` with v = s - 1 = 0, exact when the weights sum to 1.

    Args:
        site: The adapted module.
        ranks: One entry per expert; the values are not used.
        alpha: Not used; vectors have no scale.

    Attributes:
        v: ``[E, d_out]`` float32.
    """

    peft = "IA3"
    noun, size = "vector", ""
    needs_output = True

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        del alpha
        super().__init__(site=site, ranks=(1,) * len(ranks))
        self.v = nn.Parameter(torch.zeros(len(ranks), site.d_out))

    def parts(self) -> Iterator[Part]:
        """The vector ``[1, d_out]`` of every expert."""
        for e in range(self.n_experts):
            yield Part("v", "dense.v", e, self.rows(e))

    def like(self, site: Site, ranks: tuple[int, ...]) -> IA3Bank:
        """See `Bank.like`."""
        return IA3Bank(site=site, ranks=ranks, alpha=1.0)

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return ``(sum_e w_e v_e) * y0``, ``[B, T, d_out]``, for weights ``[B|1, T|1, E]``."""
        return (weights @ self.v).to(y0.dtype) * y0

    def as_one(self, weights: Tensor) -> dict[str, Tensor]:
        """See `Bank.as_one`; any weights are one vector."""
        return {"dense.v": (weights @ self.v).unsqueeze(0)}

    def folded(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The frozen linear with every output rescaled."""
        scale = 1 + weights @ self.v
        return scale.unsqueeze(-1) * weight, None if bias is None else scale * bias
