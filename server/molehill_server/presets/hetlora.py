"""HetLoRA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "hetlora", paper="Cho et al. 2024, HetLoRA", url="https://arxiv.org/abs/2401.06432")
def hetlora() -> Preset:
    """Clients train the first ranks they can afford; factors are padded and weighted by the norm of their product.

    Differs from the paper: no client prunes its own rank while it trains; ranks stay as they are dealt.
    """
    return {
        "policy": "mixed_rank",
        "space": "factor",
        "rule": "norm_weights",
        "lower": "none",
    }
