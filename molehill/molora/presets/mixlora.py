"""MixLoRA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "mixlora",
    paper="Li et al. 2024, MixLoRA",
    url="https://arxiv.org/abs/2404.15159",
    seeds=("S2",),
)
def mixlora() -> dict[str, Any]:
    """MixLoRA: every expert is the whole feed-forward block with its own LoRAs; top-2 of 8; plain LoRA in attention.

    As the paper; the frozen products are computed once and not once per expert.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "scope": "block",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "top_k", "k": 2},
        "topology": "block_ffn",
        "losses": ({"name": "switch_balance", "coef": 1e-3},),
    }
