"""Task-level mixtures."""

from __future__ import annotations

from typing import Any

from molehill.registry import register


@register(
    "preset",
    "task_moe",
    paper="Ye, Zha and Ren 2022, Eliciting and Understanding Cross-Task Skills with Task-Level MoE",
    url="https://arxiv.org/abs/2205.12701",
    seeds=("S98",),
)
def task_moe() -> dict[str, Any]:
    """Task-level MoE: one of 8 LoRAs in every layer, chosen by an embedding of the task and not by the tokens.

    Every client is a task; with ``personal.gate = "split"`` its embedding stays with it. For rows with tasks of their
    own set the scorer's ``tasks``. Differs from the paper: one rate for embeddings and network.
    """
    return {
        "targets": "all-linear",
        "experts": 8,
        "rank": 8,
        "scope": "layer",
        "scorer": "task_mlp",
        "selector": {"name": "gumbel", "start": 2.0, "end": 0.1},
    }
