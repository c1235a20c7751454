"""PERFT-E."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "perft_e",
    paper="Liu et al. 2024, PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model",
    url="https://arxiv.org/abs/2411.08212",
    seeds=("S7", "Z7"),
)
def perft_e() -> dict[str, Any]:
    """PERFT-E: a LoRA of rank 16 for every expert of a base that is a mixture, weighed by the base's own router.

    There is no router to train. For OLMoE, Mixtral, Qwen-MoE and their like; a base without experts is refused, and a
    bundle does not show what the base's router says, so such models are not exported.
    """
    return {
        "experts": 2,
        "rank": 16,
        "alpha": 32.0,
        "topology": "beside",
        "scorer": "base_router",
        "selector": "given",
    }
