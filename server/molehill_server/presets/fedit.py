"""FedIT."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation", "fedit", paper="Zhang et al. 2023, FedIT", url="https://arxiv.org/abs/2305.05644", seeds=("S127",)
)
def fedit() -> Preset:
    """All factors are shared and averaged on their own; the baseline."""
    return {
        "policy": "fedit",
        "space": "factor",
        "rule": "mean",
        "lower": "none",
    }
