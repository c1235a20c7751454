"""MH-MoE: a token is cut into parts, which are routed one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.molora.steps import BlockTopology, Run, Step
from molehill.registry import register


@dataclass(frozen=True)
class MultiHeadParams:
    """Parameters of `MultiHead`.

    Attributes:
        heads: h, parts of a token.
        mixed: Mix the features of a token before it is cut, and after its parts came together, each by a square matrix
            that is the identity and a LoRA of the experts' rank.
    """

    heads: Annotated[int, Field(ge=1)] = 4
    mixed: bool = True


@register(
    "topology",
    "multi_head",
    params=MultiHeadParams,
    paper="Wu et al. 2024, Multi-Head Mixture-of-Experts; Huang et al. 2024, MH-MoE",
    url="https://arxiv.org/abs/2404.15045",
)
class MultiHead(BlockTopology):
    """A token beside a block is cut into h parts, each routed to experts of 1/h of the width, and put together again.

    ``y = block(x) + M merge(sum_e w_e delta_e(part))`` over the parts of ``H x``; H and M are the identity at first.
    """

    def __init__(self, params: MultiHeadParams) -> None:
        self._params = params

    def steps(self, experts: int) -> tuple[Step, ...]:
        """Into heads, through the experts, and together."""
        del experts
        routed = Step(0, parts=self._params.heads)
        return (routed, Step(1, routed=False), Step(2, routed=False)) if self._params.mixed else (routed,)

    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """What the experts add to the parts, put together."""
        del y0
        if not self._params.mixed:
            return run(0, x).delta
        made = run(0, x + run(1, x).delta).delta
        return made + run(2, made).delta
