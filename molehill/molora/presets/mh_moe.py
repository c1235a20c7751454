"""MH-MoE."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "mh_moe",
    paper="Wu et al. 2024, Multi-Head Mixture-of-Experts",
    url="https://arxiv.org/abs/2404.15045",
    seeds=("S91", "S93"),
)
def mh_moe() -> dict[str, Any]:
    """MH-MoE: beside every feed-forward block a token is cut into 4 parts, each routed to 2 of 8 LoRAs of rank 16.

    Parts of a token find experts of their own, where a whole token has one choice. The layers before and after are the
    identity and a LoRA; rank 16 for a quarter of the width is what keeps the parameters of rank 4 for all of it (Huang
    et al. 2024, MH-MoE). Differs from the papers in these layers, which are free matrices there.
    """
    return {
        "experts": 8,
        "rank": 16,
        "topology": {"name": "multi_head", "heads": 4},
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 2},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
