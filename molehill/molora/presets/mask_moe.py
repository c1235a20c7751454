"""MaskMoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "mask_moe",
    paper="Su et al. 2024, MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
    url="https://arxiv.org/abs/2407.09816",
    seeds=("S97",),
)
def mask_moe() -> dict[str, Any]:
    """MaskMoE: top-1 of 8 experts of which a rare token may have one and a frequent one any, beside a shared one.

    For text with many rare words, such as drugs or parts: one expert learns all that the federation knows of a word.
    Differs from the paper: which tokens are frequent is told by the tokenizer's order, not by counts; experts are LoRAs
    of feed-forward linears.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "shared": 1,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "transforms": ("token_mask",),
        "selector": {"name": "top_k", "k": 1, "renorm": "none"},
        "blend": "by_token",
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
