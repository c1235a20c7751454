"""FedAMoLE's adapter."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import QUERY_VALUE
from molehill.registry import register


@register(
    "preset",
    "fedamole",
    paper="Zhang et al. 2024, Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model "
    "Architectures (FedAMoLE)",
    url="https://arxiv.org/abs/2411.19128",
)
def fedamole() -> dict[str, Any]:
    """FedAMoLE: one LoRA that is always on and 30 that tokens choose two of, by what these make of them.

    ``federation.preset = "fedamole"`` deals the 30 to clients; without it all are everybody's. As the paper, but that
    the balance loss counts all 30, and not only those that a client has.
    """
    return {
        "targets": QUERY_VALUE,
        "experts": 30,
        "shared": 1,
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "scorer": "lowrank_dot",
        "selector": {"name": "top_k", "k": 2},
        "losses": ({"name": "switch_balance", "normalise_by_k": True, "coef": 1e-3},),
    }
