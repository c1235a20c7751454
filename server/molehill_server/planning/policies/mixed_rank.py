"""Clients of different ranks."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.registry import register
from molehill_server.planning.shares import Shares


@dataclass(frozen=True)
class MixedRankParams:
    """Parameters of ``mixed_rank``.

    Attributes:
        ranks: Highest rank a client trains per expert, dealt to the clients in turn; an expert of lower rank is
            trained whole.
    """

    ranks: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be one or more numbers above 0, not {list(self.ranks)}")


@register(
    "policy",
    "mixed_rank",
    params=MixedRankParams,
    paper="Cho et al. 2024, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (HetLoRA)",
    url="https://arxiv.org/abs/2401.06432",
)
def mixed_rank(params: MixedRankParams, round_number: int) -> Shares:
    """Share both factors, but every client only the first ranks of each expert that it can afford.

    Differs from the paper: ranks are given and stay; the paper's clients also prune their own (rank self-pruning).
    """
    del round_number
    return Shares(ranks=params.ranks)
