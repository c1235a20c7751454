"""Parrot."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import OUTPUTS
from molehill.registry import register


@register(
    "preset",
    "parrot",
    paper="Sun et al. 2024, Parrot: Multilingual Visual Instruction Tuning",
    url="https://arxiv.org/abs/2406.02539",
    seeds=("Z3",),
)
def parrot() -> dict[str, Any]:
    """Parrot: 6 adapters weighed by the prompt, such as by its language, alike for all tokens of a row.

    Differs from the paper: adapters are bottlenecks with SiLU behind attention and feed-forward blocks, not SwiGLU
    experts on the tokens of an image; there is no image, so the query is learnt. Bundles have no input for it yet.
    """
    return {
        "targets": OUTPUTS,
        "experts": 6,
        "rank": 16,
        "scope": "model",
        "expert": {"name": "bottleneck", "activation": "silu", "source": "output"},
        "scorer": "prompt_attention",
        "selector": "dense",
        "losses": ({"name": "switch_balance", "coef": 1e-3},),
    }
