"""Share both factors."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.planning.shares import Shares


@register(
    "policy",
    "fedit",
    paper="Zhang et al. 2024, Towards Building the Federated GPT: Federated Instruction Tuning",
    url="https://arxiv.org/abs/2305.05644",
    seeds=("S127",),
)
def fedit(round_number: int) -> Shares:
    """Train and share A and B of every expert, in every round."""
    del round_number
    return Shares()
