"""RoLoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "rolora", paper="Chen et al. 2025, RoLoRA", url="https://arxiv.org/abs/2502.01755")
def rolora() -> Preset:
    """Rounds take turns to train and average B or A; every round is exact."""
    return {
        "policy": "rolora",
        "space": {"name": "common", "factor": "either"},
        "rule": "mean",
        "lower": "none",
    }
