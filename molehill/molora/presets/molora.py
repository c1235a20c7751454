"""MoLORA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "molora",
    paper="Zadouri et al. 2023, Pushing Mixture of Experts to the Limit (MoLORA)",
    url="https://arxiv.org/abs/2309.05444",
    seeds=("S13",),
)
def molora() -> dict[str, Any]:
    """MoLORA: 15 LoRAs of rank 4 on every linear under a dense softmax router, no auxiliary loss.

    Differs from the paper in its base (T5 there) and optimiser (Adafactor there).
    """
    return {
        "targets": "all-linear",
        "experts": 15,
        "rank": 4,
        "alpha": 16.0,
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": "dense",
        "init": {"name": "gaussian", "std": 0.02},
    }
