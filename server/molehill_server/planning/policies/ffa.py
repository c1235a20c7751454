"""Freeze A, share B."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.planning.shares import Shares


@register(
    "policy",
    "ffa",
    paper="Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA)",
    url="https://arxiv.org/abs/2403.12313",
    seeds=("S40",),
)
def ffa(round_number: int) -> Shares:
    """Freeze A at its common random start and share B, so the mean of B gives the mean of the products exactly."""
    del round_number
    return Shares(A="frozen")
