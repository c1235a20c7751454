"""GW-MoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "gw_moe",
    paper="Wu et al. 2024, GW-MoE",
    url="https://arxiv.org/abs/2406.12375",
    seeds=("S12", "Z2"),
)
def gw_moe() -> dict[str, Any]:
    """GW-MoE: top-2 of 8, and while training the tokens the router is unsure about go to all experts.

    Differs from the paper: LoRA experts on the feed-forward linears of a frozen model, not a mixture trained before.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "selector": {"name": "gw", "threshold": 0.87, "slots": 16, "k": 2},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
