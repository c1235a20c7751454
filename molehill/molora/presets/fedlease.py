"""The adapter of FedLEASE."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "fedlease",
    paper="Wang et al. 2025, Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning (FedLEASE)",
    url="https://arxiv.org/abs/2510.26165",
)
def fedlease() -> dict[str, Any]:
    """FedLEASE: 4 LoRAs of rank 4 on queries and values, of which the client's own is always chosen.

    Goes with the federation preset of the same name, without which nobody has an expert of its own. There are as many
    experts as there may be clusters; those that no cluster has stay closed.
    """
    return {
        "targets": (r"(?:q_proj|v_proj|query|value|c_attn)",),
        "experts": 4,
        "rank": 4,
        "alpha": 16.0,
        "dropout": 0.05,
        "scorer": "own_alias",
        "selector": "dense",
    }
