"""Houlsby's adapters."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import OUTPUTS
from molehill.registry import register


@register(
    "preset",
    "houlsby",
    paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP",
    url="https://arxiv.org/abs/1902.00751",
    seeds=("S153",),
)
def houlsby() -> dict[str, Any]:
    """Houlsby: a bottleneck of width 64 behind the attention and one behind the feed-forward block, no router.

    With more ``experts`` it is a mixture of such adapters.
    """
    return {
        "targets": OUTPUTS,
        "experts": 1,
        "rank": 64,
        "expert": {"name": "bottleneck", "activation": "gelu", "source": "output"},
    }
