"""MoLA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "mola",
    paper="Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA)",
    url="https://arxiv.org/abs/2402.08562",
    seeds=("S113",),
)
def mola() -> dict[str, Any]:
    """MoLA: 2, 4, 6, 8 LoRAs of rank 8 in the four quarters of the layers, bottom to top, top-2 renormalised.

    As the paper. ``experts`` is their mean, and nothing else follows from it.
    """
    return {
        "targets": "all-linear",
        "experts": 5,
        "rank": 8,
        "alpha": 16.0,
        "selector": {"name": "top_k", "k": 2},
        "allocation": {"name": "by_depth", "experts": (2, 4, 6, 8)},
        "losses": ({"name": "switch_balance", "normalise_by_k": True, "coef": 1e-3},),
    }
