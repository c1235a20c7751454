"""HMoE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "hmoe",
    paper="Wang et al. 2024, HMoE",
    url="https://arxiv.org/abs/2408.10681",
    seeds=("S14",),
)
def hmoe() -> dict[str, Any]:
    """HMoE: 8 LoRAs of growing rank (9 to 23 over 16), top-p 0.6, and a penalty that favours the small ones.

    Differs from the paper: sizes are ranks over their mean in the penalty, and experts are LoRAs beside a frozen
    block.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 16,
        "alpha": 32.0,
        "scope": "block",
        "selector": {"name": "top_p", "p": 0.6},
        "allocation": {"name": "hetero_rank", "kind": "arithmetic"},
        "losses": ({"name": "p_penalty", "coef": 0.1}, {"name": "entropy", "kind": "shannon", "coef": 3e-2}),
    }
