"""FedPEFT."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation", "fedpeft", paper="Sun et al. 2022, FedPEFT", url="https://arxiv.org/abs/2210.01708", seeds=("S143",)
)
def fedpeft() -> Preset:
    """Only one group of parameters is trained, sent and averaged."""
    return {
        "policy": "fedpeft",
        "space": "factor",
        "rule": "mean",
        "lower": "none",
    }
