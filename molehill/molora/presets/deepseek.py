"""DeepSeekMoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "deepseek",
    paper="Dai et al. 2024, DeepSeekMoE",
    url="https://arxiv.org/abs/2401.06066",
    seeds=("S180",),
)
def deepseek() -> dict[str, Any]:
    """DeepSeekMoE: one always-on LoRA of rank 8, and 8 routed ones cut into 32 of rank 2, of which 8 are chosen.

    Differs from the paper: LoRA experts beside a frozen block, and no balance over devices.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "shared": 1,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "selector": {"name": "top_k", "renorm": "none"},
        "allocation": {"name": "fine_grained", "m": 4, "k": 2},
        "losses": ({"name": "switch_balance", "normalise_by_k": True, "coef": 1e-2},),
    }
