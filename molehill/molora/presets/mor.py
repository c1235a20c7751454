"""Mixture of Routers."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "mor",
    paper="Zhang et al. 2025, Mixture of Routers",
    url="https://arxiv.org/abs/2503.23362",
    seeds=("S3", "Z5"),
)
def mor() -> dict[str, Any]:
    """MoR: three sub-routers mixed by a main router score 8 LoRAs, top-2 renormalised, on every linear.

    The paper puts its routers on MoLA and on MixLoRA; this is the plain form with the same experts at every site.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 8,
        "alpha": 16.0,
        "scorer": {"name": "mixture", "m": 3},
        "selector": {"name": "top_k", "k": 2},
        "losses": ({"name": "switch_balance", "normalise_by_k": True, "coef": 1e-3},),
    }
