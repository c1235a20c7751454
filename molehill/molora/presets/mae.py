"""MAE."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "mae",
    paper="Peng et al. 2020, A Mixture of h - 1 Heads is Better than h Heads",
    url="https://arxiv.org/abs/2005.06537",
    seeds=("S135",),
)
def mae() -> dict[str, Any]:
    """MAE: 4 LoRAs on every linear; a token has all but the one that it trusts least, mixed over which that is.

    Differs from the paper: experts are LoRAs and not heads of attention, and whether a pass trains the gate or the
    experts is drawn, one in five.
    """
    return {
        "targets": "all-linear",
        "experts": 4,
        "rank": 8,
        "scorer": {"name": "linear", "init": "normal", "std": 0.02},
        "selector": {"name": "leave_one_out", "gate": 0.2},
    }
