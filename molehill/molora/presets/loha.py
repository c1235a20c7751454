"""LoHa."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "loha",
    paper="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    url="https://arxiv.org/abs/2309.14859",
    seeds=("S96",),
)
def loha() -> dict[str, Any]:
    """LyCORIS, LoHa: one product of two low-rank matrices on every linear, element by element; no router.

    Of a higher rank than a LoRA with as many numbers; peft opens an expert's folder by itself. Slower in training: the
    change of the weight is made in every pass.
    """
    return {
        "targets": "all-linear",
        "experts": 1,
        "rank": 8,
        "alpha": 8.0,
        "expert": "loha",
        "selector": "dense",
    }
