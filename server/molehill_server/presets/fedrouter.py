"""FedRouter."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation",
    "fedrouter",
    paper="Talasso et al. 2026, Task-Centric Personalized Federated Fine-Tuning of Language Models (FedRouter)",
    url="https://arxiv.org/abs/2604.00050",
)
def fedrouter() -> Preset:
    """An adapter for each cluster of a client's rows at first; then an expert for each task, whoever has rows of it.

    Goes with the adapter of the same name. See the assignment for what differs from the paper.
    """
    return {
        "policy": "fedit",
        "space": "factor",
        "rule": "mean",
        "lower": "none",
        "assign": {"name": "task_clusters", "local": 2, "warmup": 1},
    }
