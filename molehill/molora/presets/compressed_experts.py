"""Compressed experts."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "compressed_experts",
    paper="He et al. 2025, Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    url="https://arxiv.org/abs/2503.00634",
    seeds=("S81",),
)
def compressed_experts() -> dict[str, Any]:
    """Compressed experts: of a token's 4 experts the best 2 count, the other 2 as a vector on their input.

    Half of the active experts, and of the others what one vector each can say. Differs from the paper: experts are
    LoRAs beside a frozen block that are trained together with the vectors, where the paper takes a mixture that is
    trained already; and all experts are computed, so that no time is saved yet.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "alpha": 16.0,
        "scope": "block",
        "expert": "compressed",
        "selector": {"name": "top_k", "k": 4},
        "mixer": {"name": "compressed", "main": 2},
    }
