"""Dynamic top-p routing."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "top_p",
    paper="Huang et al. 2024, Harder Tasks Need More Experts",
    url="https://arxiv.org/abs/2403.07652",
    seeds=("S8",),
)
def top_p() -> dict[str, Any]:
    """Dynamic routing: the smallest set of experts whose probabilities reach 0.4, weights not renormalised.

    Differs from the paper: LoRA experts on the feed-forward linears of a frozen model, not a model trained so.
    """
    return {
        "targets": FFN,
        "experts": 16,
        "rank": 4,
        "alpha": 16.0,
        "scope": "block",
        "selector": {"name": "top_p", "p": 0.4},
        "losses": ({"name": "switch_balance", "coef": 1e-2}, {"name": "entropy", "kind": "shannon", "coef": 1e-4}),
    }
