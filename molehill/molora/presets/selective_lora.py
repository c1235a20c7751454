"""Selective LoRA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "selective_lora",
    paper="Bafghi et al. 2025, Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation",
    url="https://arxiv.org/abs/2501.15377",
    seeds=("S75",),
)
def selective_lora() -> dict[str, Any]:
    """Selective LoRA: one LoRA of rank 8 on few linears, which are found: scores fall until a twentieth is left.

    For what the base knows not to be forgotten. Differs from the paper: the penalty stops at the share that is wanted,
    where there its weight is tuned for it.
    """
    return {
        "targets": "all-linear",
        "experts": 1,
        "rank": 8,
        "selector": "dense",
        "allocation": {"name": "gated_sites", "threshold": 0.1, "start": 0.15},
        "losses": ({"name": "site_l1", "after": 0.0, "target": 0.05, "coef": 1.0},),
    }
