"""FedLEASE."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation",
    "fedlease",
    paper="Wang et al. 2025, Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning (FedLEASE)",
    url="https://arxiv.org/abs/2510.26165",
)
def fedlease() -> Preset:
    """A LoRA each at first; then an expert for each cluster of clients, trained by the cluster and used by all.

    Goes with the adapter of the same name. See the assignment for what differs from the paper.
    """
    return {
        "policy": "fedit",
        "space": "factor",
        "rule": "even",
        "lower": "none",
        "assign": {"name": "lease", "warmup": 5, "most": 4},
    }
