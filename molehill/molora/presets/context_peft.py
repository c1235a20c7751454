"""Context-PEFT."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import QUERY_VALUE
from molehill.registry import register


@register(
    "preset",
    "context_peft",
    paper="Hadji-Kyriacou and Arandjelovic 2024, Context-PEFT",
    url="https://arxiv.org/abs/2312.08900",
    seeds=("S77",),
)
def context_peft() -> dict[str, Any]:
    """Context-PEFT: one LoRA for all text, and one for each of 4 domains that a row may be of.

    For text whose kinds are known and differ, such as sources or languages. ``data.columns.domain`` names the column,
    and ``data.domains`` what it may hold. Differs from the paper: a row is of one domain, where the paper has images
    and text in one row.
    """
    return {
        "targets": QUERY_VALUE,
        "experts": 4,
        "shared": 1,
        "rank": 8,
        "alpha": 16.0,
        "scope": "model",
        "scorer": "contexts",
        "selector": "given",
    }
