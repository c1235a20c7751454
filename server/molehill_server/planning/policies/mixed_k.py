"""Clients with different numbers of experts per token."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.registry import register
from molehill_server.planning.shares import Shares


@dataclass(frozen=True)
class MixedKParams:
    """Parameters of ``mixed_k``.

    Attributes:
        ks: Experts per token that a client can afford, dealt to the clients in turn; all where there are fewer. Where a
            selector makes weights sum to 1 (``renorm``), a lone expert's is 1 and the router of such a client learns
            from routing losses alone.
    """

    ks: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be one or more numbers above 0, not {list(self.ks)}")


@register(
    "policy",
    "mixed_k",
    params=MixedKParams,
    paper="house: budgets of clients are numbers of experts per token, as in FLAME (Le et al. 2025)",
)
def mixed_k(params: MixedKParams, round_number: int) -> Shares:
    """Share both factors; routers choose for every client as many experts per token as it can afford.

    All clients have all experts, so what they send is averaged as ever. A client trains, is scored and answers with its
    own number; the model that all share has that of the selector. An allocation must not say how many a token has.
    """
    del round_number
    return Shares(ks=params.ks)
