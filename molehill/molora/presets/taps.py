"""TAPS."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "taps",
    paper="Wallingford et al. 2022, Task Adaptive Parameter Sharing for Multi-Task Learning",
    url="https://arxiv.org/abs/2203.16708",
    seeds=("S37",),
)
def taps() -> dict[str, Any]:
    """TAPS: one LoRA of rank 8 on every linear that an owner turns out to need; the others stay as the base has them.

    Every owner has its own set of linears, where ``personal.gate`` is anchored or split, and its bundle changes only
    those. Differs from the paper: changes are LoRAs, and scores learn at ``train.router_lr``.
    """
    return {
        "targets": "all-linear",
        "experts": 1,
        "rank": 8,
        "selector": "dense",
        "allocation": {"name": "gated_sites", "threshold": 0.1, "start": 0.15},
        "losses": ({"name": "site_l1", "after": 0.1, "coef": 1.0},),
    }
