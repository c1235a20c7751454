"""Chain-of-Experts: experts that pass a token on to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.molora.steps import BlockTopology, Run, Step
from molehill.registry import register


@dataclass(frozen=True)
class ChainParams:
    """Parameters of `Chain`.

    Attributes:
        rounds: C, how often a token goes through the experts.
    """

    rounds: Annotated[int, Field(ge=1, le=8)] = 2


@register(
    "topology",
    "chain",
    params=ChainParams,
    paper="Wang et al. 2025, Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models",
    url="https://arxiv.org/abs/2506.18945",
)
class Chain(BlockTopology):
    """Rounds over the same experts beside a block, each routed by a router of its own on what the round before made.

    ``x_t = x_(t-1) + sum_e w_te delta_e(x_(t-1))``, and ``y = block(x) + x_C - x``. One round is ``beside``. Two rounds
    of top-k cost as much as one of top-2k, and combine experts in more ways.
    """

    def __init__(self, params: ChainParams) -> None:
        self._rounds = params.rounds

    def steps(self, experts: int) -> tuple[Step, ...]:
        """As many as rounds, through one bank."""
        del experts
        return (Step(0),) * self._rounds

    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """The sum over rounds."""
        del y0
        total = run(0, x).delta
        for number in range(1, self._rounds):
            total = total + run(number, x + total).delta
        return total
