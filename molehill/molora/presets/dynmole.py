"""DynMoLE."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "dynmole",
    paper="Li et al. 2025, DynMoLE",
    url="https://arxiv.org/abs/2504.00661",
    seeds=("Z1",),
)
def dynmole() -> dict[str, Any]:
    """DynMoLE: all 6 LoRAs for tokens of high Tsallis entropy, top-p with a floor of 2 for the others.

    As the paper; its released code leaves out the expert with which top-p reaches its mass (``inclusive = false``).
    """
    return {
        "targets": FFN,
        "experts": 6,
        "rank": 24,
        "alpha": 48.0,
        "dropout": 0.05,
        "selector": {"name": "dynmole", "tau": 0.9, "q": 1.1, "p": 0.75, "keep_top_k": 2},
        "losses": (
            {"name": "entropy", "kind": "tsallis", "q": 1.1, "coef": 1e-2},
            {"name": "dynmole_balance", "coef": 1e-3},
        ),
    }
