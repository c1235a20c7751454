"""The deep mixture of experts."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "deep_moe",
    paper="Eigen, Ranzato and Sutskever 2013, Learning Factored Representations in a Deep Mixture of Experts",
    url="https://arxiv.org/abs/1312.4314",
    seeds=("S136",),
)
def deep_moe() -> dict[str, Any]:
    """Deep MoE: two layers of 4 LoRAs beside each feed-forward block, all weighted by a softmax, that start in balance.

    One layer may learn what a token is about, the other where it stands. In the first fifth of training an expert that
    had more than its share by half is shut for a while. The margin and the fifth are ours.
    """
    return {
        "experts": 4,
        "rank": 8,
        "topology": "product",
        "scorer": {"name": "running_cap", "margin": 0.5, "phase": 0.2},
        "selector": "dense",
    }
