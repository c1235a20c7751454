"""LoRA experts: one LoRA whose rank axis is divided between them."""

from __future__ import annotations

from molehill.molora.banks import PairBank
from molehill.molora.interfaces import Site
from molehill.registry import register


@register(
    "expert",
    "lora",
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
    url="https://arxiv.org/abs/2106.09685",
)
class LoRABank(PairBank):
    """``delta_e(x) = (alpha / r_e) B_e A_e x``.

    Args:
        site: The adapted module.
        ranks: Rank of every expert, shared ones first.
        alpha: LoRA alpha.
    """

    peft = "LORA"
    noun, size = "LoRA", "rank"

    def __init__(self, *, site: Site, ranks: tuple[int, ...], alpha: float) -> None:
        super().__init__(site=site, ranks=ranks, scales=tuple(alpha / rank for rank in ranks))
