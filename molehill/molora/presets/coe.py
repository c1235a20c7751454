"""Chain-of-Experts."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "coe",
    paper="Wang et al. 2025, Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models",
    url="https://arxiv.org/abs/2506.18945",
    seeds=("S52",),
)
def coe() -> dict[str, Any]:
    """Chain-of-Experts: 2 rounds over 8 LoRAs beside each feed-forward block, 2 and a shared one a round.

    More depth from the same adapter: the second round routes and reads what the first made of a token.
    Differs from the paper in what an expert is: a feed-forward block there, trained from nothing.
    """
    return {
        "experts": 8,
        "shared": 1,
        "rank": 8,
        "topology": {"name": "chain", "rounds": 2},
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 2},
        "losses": ({"name": "switch_balance", "coef": 1e-3},),
    }
