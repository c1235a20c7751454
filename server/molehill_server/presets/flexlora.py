"""FlexLoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "flexlora", paper="Bai et al. 2024, FlexLoRA", url="https://arxiv.org/abs/2402.11505")
def flexlora() -> Preset:
    """Products are averaged and brought back to the shared rank by SVD."""
    return {
        "policy": "fedit",
        "space": "product",
        "rule": "mean",
        "lower": "svd",
    }
