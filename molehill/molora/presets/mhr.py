"""MHR."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.poly import poly
from molehill.registry import register


@register(
    "preset",
    "mhr",
    paper="Caccia et al. 2023, Multi-Head Adapter Routing for Cross-Task Generalization",
    url="https://arxiv.org/abs/2211.03831",
    seeds=("S118",),
)
def mhr() -> dict[str, Any]:
    """MHR: Poly with A and B cut into 4 blocks of features, each with gates of its own.

    Differs from the paper as Poly does.
    """
    return {**poly(), "scorer": {"name": "task_table", "splits": 4}}
