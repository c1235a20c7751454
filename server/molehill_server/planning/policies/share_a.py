"""Share A, keep B."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.planning.shares import Shares


@register(
    "policy",
    "share_a",
    paper="Guo et al. 2025, Selective Aggregation for Low-Rank Adaptation in Federated Learning (FedSA-LoRA)",
    url="https://arxiv.org/abs/2410.01463",
)
def share_a(round_number: int) -> Shares:
    """Average A; B and the classification head are trained but never leave the client.

    A client that never trained has B = 0 and is the base model.
    """
    del round_number
    return Shares(B="personal", head="personal")
