"""The adapter of FedRouter."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import QUERY_VALUE
from molehill.registry import register


@register(
    "preset",
    "fedrouter",
    paper="Talasso et al. 2026, Task-Centric Personalized Federated Fine-Tuning of Language Models (FedRouter)",
    url="https://arxiv.org/abs/2604.00050",
)
def fedrouter() -> dict[str, Any]:
    """FedRouter: 4 LoRAs of rank 8 on queries and values, of which a row has the one that is nearest to its prompt.

    Goes with the federation preset of the same name, without which no expert has a centroid.
    """
    return {
        "targets": QUERY_VALUE,
        "experts": 4,
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "scope": "model",
        "scorer": "nearest_centroid",
        "selector": {"name": "top_k", "k": 1},
        "init": "alike",
    }
