"""PERFT-R."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "perft_r",
    paper="Liu et al. 2024, PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model",
    url="https://arxiv.org/abs/2411.08212",
    seeds=("S7", "Z7"),
)
def perft_r() -> dict[str, Any]:
    """PERFT-R: 4 LoRAs of rank 16 beside every whole feed-forward block under a router of their own, top-2.

    For a base that is a mixture itself, or any other: its block stays as it is. The weights of two experts are their
    probabilities, as in OLMoE; for a base that brings the weights of its own to 1, as Mixtral, add ``renorm =
    "selected"``. Differs from the paper in start values: B is 0, there 1e-6 of noise.
    """
    return {
        "experts": 4,
        "rank": 16,
        "alpha": 32.0,
        "topology": "beside",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 2, "renorm": "none"},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
