"""Local training."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "local", paper="house")
def local() -> Preset:
    """Nothing is shared; every client trains alone."""
    return {
        "policy": "local",
        "space": "factor",
        "rule": "mean",
        "lower": "none",
    }
