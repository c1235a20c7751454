"""Train one factor at a time."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.planning.shares import Shares


@register(
    "policy",
    "rolora",
    paper="Chen et al. 2025, Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA (RoLoRA)",
    url="https://arxiv.org/abs/2502.01755",
)
def rolora(round_number: int) -> Shares:
    """Odd rounds train and share B with A frozen, even rounds A with B frozen; every round's mean is exact."""
    return Shares(A="frozen") if round_number % 2 else Shares(B="frozen")
