"""Laplace gating."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "laplace",
    paper="Nguyen et al. 2024, On Expert Estimation in Hierarchical Mixture of Experts",
    url="https://arxiv.org/abs/2410.02935",
    seeds=("S36",),
)
def laplace() -> dict[str, Any]:
    """Laplace gating: 8 LoRAs on every linear, all weighted by how near a token is to each one's centre.

    For texts whose topics are clusters. ``scorer = {name = "laplace", groups = 4}`` has two levels.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 8,
        "scorer": "laplace",
        "selector": "dense",
    }
