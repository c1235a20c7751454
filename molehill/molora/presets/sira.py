"""SiRA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "sira",
    paper="Zhu et al. 2023, SiRA: Sparse Mixture of Low Rank Adaptation",
    url="https://arxiv.org/abs/2311.09179",
    seeds=("S49",),
)
def sira() -> dict[str, Any]:
    """SiRA: 4 of 16 LoRAs of rank 4 on every linear, which take a limited number of tokens, and drop out in training.

    For little data: experts learn to stand in for each other. The paper's numbers of experts and its rates could not be
    verified; these are ours.
    """
    return {
        "targets": "all-linear",
        "experts": 16,
        "rank": 4,
        "alpha": 8.0,
        "transforms": ({"name": "expert_dropout", "p": 0.1},),
        "selector": {"name": "top_k", "k": 4, "capacity": 1.25},
        "losses": ({"name": "switch_balance", "normalise_by_k": True, "coef": 1e-2},),
    }
