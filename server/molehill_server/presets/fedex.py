"""FedEx-LoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "fedex", paper="Singhal et al. 2025, FedEx-LoRA", url="https://arxiv.org/abs/2410.09432")
def fedex() -> Preset:
    """Averaged factors plus the exact residual as a frozen patch."""
    return {
        "policy": "fedit",
        "space": "product",
        "rule": "mean",
        "lower": "residual",
    }
