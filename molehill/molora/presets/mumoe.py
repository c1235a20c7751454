"""Multilinear mixtures of experts."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "mumoe",
    paper="Oldfield et al. 2024, Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization",
    url="https://arxiv.org/abs/2402.12550",
    seeds=("S78",),
)
def mumoe() -> dict[str, Any]:
    """muMoE: 64 tiny experts per feed-forward block that are slices of one factored tensor, one row of numbers each.

    Differs from the paper: weights are a softmax and not entmax, without normalisation of the scores before it, and the
    router starts near 0 and not at it; the layer is a change of frozen linears.
    """
    return {
        "targets": FFN,
        "experts": 64,
        "rank": 64,
        "scope": "block",
        "expert": "cp",
        "scorer": {"name": "linear", "init": "normal", "std": 1e-4},
        "selector": "dense",
    }
