"""FedSA-LoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "fedsa", paper="Guo et al. 2025, FedSA-LoRA", url="https://arxiv.org/abs/2410.01463")
def fedsa() -> Preset:
    """A is averaged; B stays with the client."""
    return {
        "policy": "share_a",
        "space": "factor",
        "rule": "mean",
        "lower": "none",
    }
