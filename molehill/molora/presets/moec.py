"""MoEC."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "moec",
    paper="Xie et al. 2022, MoEC: Mixture of Expert Clusters",
    url="https://arxiv.org/abs/2207.09094",
    seeds=("S55",),
)
def moec() -> dict[str, Any]:
    """MoEC: 8 LoRAs per feed-forward block in 4 clusters that share their work; half of each is closed for a while.

    For owners of a few kinds: experts of one cluster stay close, so that none of them starves. Differs from the paper:
    8 experts in place of 64, and top-2.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "scope": "block",
        "scorer": "cosine_gate",
        "transforms": ({"name": "cluster_dropout", "clusters": 4, "p": 0.5},),
        "selector": {"name": "top_k", "k": 2},
        "losses": (
            {"name": "switch_balance", "normalise_by_k": True, "coef": 1e-2},
            {"name": "cluster_variance", "clusters": 4, "coef": 1e-2},
        ),
    }
