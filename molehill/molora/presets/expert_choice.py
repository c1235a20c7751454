"""Expert choice."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "expert_choice",
    paper="Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing",
    url="https://arxiv.org/abs/2202.09368",
    seeds=("S27",),
)
def expert_choice() -> dict[str, Any]:
    """Expert choice: 8 LoRAs per feed-forward block, each of which takes its best quarter of a text's tokens.

    All experts carry the same without a loss for it, and tokens that matter get more of them. For classifiers: a
    token's route depends on later ones, so a model with it does not write.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "scope": "block",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "expert_choice", "capacity": 2.0},
    }
