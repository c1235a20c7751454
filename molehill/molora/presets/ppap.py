"""Experts for ranges of a number."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import QUERY_VALUE
from molehill.registry import register


@register(
    "preset",
    "ppap",
    paper="Go et al. 2023, Towards Practical Plug-and-Play Diffusion Models (PPAP)",
    url="https://arxiv.org/abs/2212.05973",
    seeds=("S1",),
)
def ppap() -> dict[str, Any]:
    """PPAP: five LoRAs for five ranges of a number that every row has, and nothing that they share.

    For text that changes along a number which is known of every row: its year, its length, the age of who wrote it.
    ``data.columns.domain`` names the column, and ``data.domains`` has the four edges between the ranges. Differs from
    the paper: there the number is the noise of a picture that is being made.
    """
    return {
        "targets": QUERY_VALUE,
        "experts": 5,
        "rank": 16,
        "alpha": 8.0,
        "scope": "model",
        "scorer": "contexts",
        "selector": "given",
    }
