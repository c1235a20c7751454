"""Plain LoRA."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "lora",
    paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models",
    url="https://arxiv.org/abs/2106.09685",
)
def lora() -> dict[str, Any]:
    """LoRA: one expert with weight 1 on every linear; the baseline of every mixture.

    Differs from the paper, which adapts the query and value projections only.
    """
    return {
        "targets": "all-linear",
        "experts": 1,
        "rank": 8,
        "alpha": 16.0,
        "selector": "dense",
    }
