"""FFA-LoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation", "ffa", paper="Sun et al. 2024, FFA-LoRA", url="https://arxiv.org/abs/2403.12313", seeds=("S40",)
)
def ffa() -> Preset:
    """A is frozen at its common start; only B is trained and sent, and its mean is exact."""
    return {
        "policy": "ffa",
        "space": {"name": "common", "factor": "A"},
        "rule": "mean",
        "lower": "none",
    }
