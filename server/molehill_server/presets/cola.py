"""COLA."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation",
    "cola",
    paper="Xia, Qin and Hazan 2024, Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
    url="https://arxiv.org/abs/2401.04151",
    seeds=("S31",),
)
def cola() -> Preset:
    """A chain of LoRAs: all factors are averaged, and every second round frozen into the model, up to three LoRAs.

    The rank grows over the run at the price of one small LoRA per round. The lengths are ours.
    """
    return {
        "policy": "fedit",
        "space": "factor",
        "rule": "mean",
        "lower": {"name": "chain_of_loras", "every": 2, "links": 3},
    }
