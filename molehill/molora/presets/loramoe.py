"""LoRAMoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "loramoe",
    paper="Dou et al. 2023, LoRAMoE",
    url="https://arxiv.org/abs/2312.09979",
    seeds=("S20",),
)
def loramoe() -> dict[str, Any]:
    """LoRAMoE: 8 LoRAs of rank 4 on every feed-forward linear, all weighted by a softmax, in two groups.

    Differs from the released code, which counts padding in the balance; a row's type is its task id.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 4,
        "alpha": 32.0,
        "dropout": 0.05,
        "selector": "dense",
        "losses": ({"name": "localized_balance", "delta": 0.1, "types": 2, "coef": 0.1},),
    }
