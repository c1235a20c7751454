"""FedAMoLE."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register(
    "federation",
    "fedamole",
    paper="Zhang et al. 2024, Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model "
    "Architectures (FedAMoLE)",
    url="https://arxiv.org/abs/2411.19128",
)
def fedamole() -> Preset:
    """Experts choose the clients that train and use them; those of one id are averaged, and all clients count alike.

    The adapter is the preset of the same name. With ``personal.gate = "split"`` and ``personal.head = "global"``
    nothing but the choice of experts is a client's own, as in the paper.
    """
    return {
        "policy": "fedit",
        "space": "factor",
        "rule": "even",
        "assign": "reverse",
        "lower": "none",
    }
