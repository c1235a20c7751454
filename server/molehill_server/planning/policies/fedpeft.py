"""Train and share one group of tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from molehill.plan import Scope
from molehill.registry import register
from molehill_server.planning.shares import Shares


@dataclass(frozen=True)
class FedPEFTParams:
    """Parameters of ``fedpeft``.

    Attributes:
        group: The tensors that are trained and shared; all others stay as they started.
    """

    group: Literal["experts", "gate", "head"] = "experts"


@register(
    "policy",
    "fedpeft",
    params=FedPEFTParams,
    paper="Sun et al. 2022, FedPEFT",
    url="https://arxiv.org/abs/2210.01708",
    seeds=("S143",),
)
def fedpeft(params: FedPEFTParams, round_number: int) -> Shares:
    """Train and share one group of tensors and freeze the rest."""
    del round_number
    scopes: dict[str, Scope] = dict.fromkeys(("experts", "gate", "head"), "frozen")
    scopes[params.group] = "shared"
    experts = scopes["experts"]
    return Shares(A=experts, B=experts, dense=experts, gate=scopes["gate"], head=scopes["head"], other=experts)
