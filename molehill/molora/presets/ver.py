"""VER."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "ver",
    paper="Wang et al. 2025, VER: Vision Expert Transformer for Robot Learning",
    url="https://arxiv.org/abs/2510.05213",
    seeds=("S60",),
)
def ver() -> dict[str, Any]:
    """VER: 6 LoRAs per feed-forward block, all of them chosen at first and 2 at last, by a gate with learnt noise.

    An expert that is not chosen tells the gate nothing of its worth, so all are heard while the gate is young. With
    tasks in the data, experts come to belong to them. Differs from the paper: the number falls while the experts
    are trained along, and not over experts that are finished and frozen, since a run cannot start from those; and all
    layers have experts.
    """
    return {
        "targets": FFN,
        "experts": 6,
        "rank": 8,
        "scope": "block",
        "scorer": "noisy_linear",
        "selector": {"name": "top_k", "k": 2, "start": 6},
        "losses": ({"name": "task_information", "coef": 5e-4},),
    }
