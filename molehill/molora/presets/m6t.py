"""M6-T."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import FFN
from molehill.registry import register


@register(
    "preset",
    "m6t",
    paper="Yang et al. 2021, M6-T: Exploring Sparse Expert Models and Beyond",
    url="https://arxiv.org/abs/2105.15082",
    seeds=("S117",),
)
def m6t() -> dict[str, Any]:
    """M6-T: 8 LoRAs per feed-forward block in two groups, of each of which a token has the best; no balance loss.

    Two experts of different kinds for every token, where top-2 may take two of one kind. Differs from the paper: no
    limit on how many tokens an expert takes.
    """
    return {
        "targets": FFN,
        "experts": 8,
        "rank": 8,
        "scope": "block",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "grouped", "groups": 2},
    }
