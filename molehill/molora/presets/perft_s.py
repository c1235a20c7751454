"""PERFT-S."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "perft_s",
    paper="Liu et al. 2024, PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model",
    url="https://arxiv.org/abs/2411.08212",
    seeds=("S7", "Z7"),
)
def perft_s() -> dict[str, Any]:
    """PERFT-S: one LoRA of rank 16 beside every whole feed-forward block, always on, without a router.

    With ``shared = 4`` in place of ``experts`` it is PERFT-D, several that are always on.
    """
    return {
        "experts": 1,
        "rank": 16,
        "alpha": 32.0,
        "topology": "beside",
        "selector": "dense",
    }
