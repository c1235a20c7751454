"""Poly."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "poly",
    paper="Ponti et al. 2022, Combining Modular Skills in Multitask Learning (Poly)",
    url="https://arxiv.org/abs/2202.13914",
    seeds=("S118",),
)
def poly() -> dict[str, Any]:
    """Poly: every task mixes the parameters of 8 skill LoRAs with its own row of gates; nothing depends on the token.

    A client is one task here (one row, kept by the client with ``personal.gate = "personal"``); for clients that hold
    several tasks set the scorer's ``tasks`` and map a task column.

    Differs from the paper: gates are plain sigmoids, not samples of a relaxed Bernoulli.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 4,
        "alpha": 16.0,
        "scorer": {"name": "task_table", "splits": 1},
        "selector": {"name": "dense", "activation": "sigmoid_norm"},
        "mixer": "param",
    }
