"""FLoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "flora", paper="Wang et al. 2024, FLoRA", url="https://arxiv.org/abs/2409.05976")
def flora() -> Preset:
    """Stacked factors are merged into frozen patches and the experts restart; exact for any ranks."""
    return {
        "policy": "fedit",
        "space": "stack",
        "rule": "mean",
        "lower": "merge_restart",
    }
