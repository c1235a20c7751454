"""MoV."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import KEY_VALUE_FFN_IN
from molehill.registry import register


@register(
    "preset",
    "mov",
    paper="Zadouri et al. 2023, Pushing Mixture of Experts to the Limit (MoV)",
    url="https://arxiv.org/abs/2309.05444",
    seeds=("S13",),
)
def mov() -> dict[str, Any]:
    """MoV: 30 (IA)3 vectors on keys, values and the feed-forward hidden layer under a dense softmax router.

    Differs from the paper where the hidden layer has no gate (BERT, GPT-2): there the vector scales the hidden layer
    before its activation, since an expert is a delta on a linear's output. On gated blocks the two are equal.
    """
    return {
        "targets": KEY_VALUE_FFN_IN,
        "experts": 30,
        "expert": "ia3",
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": "dense",
    }
