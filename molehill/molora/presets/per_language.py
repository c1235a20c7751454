"""An adapter for each language."""

from __future__ import annotations

from typing import Any

from molehill.molora.presets.targets import OUTPUTS
from molehill.registry import register


@register(
    "preset",
    "per_language",
    paper="Wang et al. 2023, One Adapter for All Programming Languages? Adapter Tuning for Code Search and "
    "Summarization",
    url="https://arxiv.org/abs/2303.15822",
    seeds=("S110",),
)
def per_language() -> dict[str, Any]:
    """A bottleneck of width 64 for each of 4 languages, and one for all of them.

    For text or code in several languages that are known row by row (``data.columns.domain``, ``data.domains``); an
    owner trains those of its languages only. The paper compares one adapter for all with one for each; here a row has
    both.
    """
    return {
        "targets": OUTPUTS,
        "experts": 4,
        "shared": 1,
        "rank": 64,
        "scope": "model",
        "expert": "bottleneck",
        "scorer": "contexts",
        "selector": "given",
    }
