"""FLAN-MoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "flan_moe",
    paper="Shen et al. 2023, Mixture-of-Experts Meets Instruction Tuning",
    url="https://arxiv.org/abs/2305.14705",
    seeds=("S107",),
)
def flan_moe() -> dict[str, Any]:
    """FLAN-MoE: top-2 of 8 LoRAs per feed-forward block, with balance and z-loss, and dropout of experts.

    The paper's recipe for instructions of many tasks. With ``federation.policy = {name = "fedpeft", group =
    "experts"}`` the gate stays as it started, its other variant (the head then does, too). Differs from the paper:
    LoRAs beside a frozen block, and the rate of dropout is ours.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "scope": "block",
        "transforms": ({"name": "expert_dropout", "p": 0.05},),
        "selector": {"name": "top_k", "k": 2},
        "losses": (
            {"name": "switch_balance", "normalise_by_k": True, "coef": 1e-2},
            {"name": "z_loss", "coef": 1e-3},
        ),
    }
