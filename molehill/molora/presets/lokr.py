"""LoKr."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "lokr",
    paper="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    url="https://arxiv.org/abs/2309.14859",
    seeds=("S96",),
)
def lokr() -> dict[str, Any]:
    """LyCORIS, LoKr: one Kronecker product of a small matrix and a low-rank one on every linear; no router.

    The least that owners can send of a change of full rank; peft opens an expert's folder by itself.
    """
    return {
        "targets": "all-linear",
        "experts": 1,
        "rank": 4,
        "alpha": 4.0,
        "expert": "lokr",
        "selector": "dense",
    }
