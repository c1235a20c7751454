"""Differentiable model selection."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "diff_select",
    paper="Kotary, Di Vito and Fioretto 2022, Differentiable Model Selection for Ensemble Learning",
    url="https://arxiv.org/abs/2211.00251",
    seeds=("S126",),
)
def diff_select() -> dict[str, Any]:
    """e2e-CEL: an even vote of 2 of 8 LoRAs on every linear, by a gate that learns of those that were not chosen, too.

    Differs from the paper: it chooses for every token and not for a whole input, of adapters that are trained along;
    with ``federation.policy = {name = "fedpeft", group = "gate"}`` they stay. The noise and its draws are ours.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 8,
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "perturbed_top_k", "k": 2},
    }
