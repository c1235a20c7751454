"""Switch."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "switch",
    paper="Fedus, Zoph and Shazeer 2021, Switch Transformers",
    url="https://arxiv.org/abs/2101.03961",
    seeds=("S171",),
)
def switch() -> dict[str, Any]:
    """Switch: top-1 of 8 per feed-forward block, weight not renormalised, capacity 1.25, input jitter.

    Differs from the paper: experts are LoRAs beside a frozen block, so a token over capacity keeps the frozen output
    instead of passing by the block; capacity counts the whole batch.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "scorer": {"name": "linear", "init": "switch", "jitter": 0.01},
        "selector": {"name": "switch", "capacity": 1.25},
        "losses": ({"name": "switch_balance", "coef": 1e-2},),
    }
