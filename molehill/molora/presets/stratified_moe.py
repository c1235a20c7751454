"""The stratified mixture."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "stratified_moe",
    paper="Xu et al. 2023, Towards Being Parameter-Efficient: A Stratified Sparsely "
    "Activated Transformer with Dynamic Capacity",
    url="https://arxiv.org/abs/2305.02176",
    seeds=("S131",),
)
def stratified_moe() -> dict[str, Any]:
    """Stratified SMoE: 8 LoRAs in 2 strata beside each feed-forward block; a token has one expert, or two.

    Hard tokens get more than easy ones. Differs from the paper in the norm between passes, which is left out, and in
    what is saved: every pass is computed for all tokens.
    """
    return {
        "experts": 8,
        "rank": 8,
        "topology": {"name": "strata", "strata": 2},
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 1, "renorm": "none"},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
