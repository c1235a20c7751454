"""Hydra."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import QUERY_VALUE
from molehill.registry import register


@register(
    "preset",
    "hydra",
    paper="Kim et al. 2023, Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
    url="https://arxiv.org/abs/2309.06922",
    seeds=("S139",),
)
def hydra() -> dict[str, Any]:
    """Hydra: one LoRA of rank 8 beside every query and value and one behind it, no router.

    For texts that are far from what the base knows. With more ``experts`` it is a mixture; ``--merged`` puts it into
    the weights.
    """
    return {
        "targets": QUERY_VALUE,
        "experts": 1,
        "rank": 8,
        "alpha": 16.0,
        "expert": "hydra",
        "selector": "dense",
    }
