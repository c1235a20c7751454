"""CartesianMoE."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "cartesian_moe",
    paper="Su et al. 2024, CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing",
    url="https://arxiv.org/abs/2410.16077",
    seeds=("S177",),
)
def cartesian_moe() -> dict[str, Any]:
    """CartesianMoE: two layers of 4 LoRAs and a shared one beside each feed-forward block; tokens have one of 16 pairs.

    In either layer routed and shared experts share the weight by a softmax that is learnt. Knowledge that several pairs
    need lies in the expert that they have in common. Differs from the paper in what an expert is: a feed-forward block.
    """
    return {
        "experts": 4,
        "shared": 1,
        "rank": 8,
        "topology": "product",
        "blend": "by_token",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 2},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
