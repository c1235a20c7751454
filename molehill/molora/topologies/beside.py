"""PERFT: experts beside a whole block."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.steps import BlockTopology, Run, Step
from molehill.registry import register


@register(
    "topology",
    "beside",
    paper="Liu et al. 2024, PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model",
    url="https://arxiv.org/abs/2411.08212",
)
class Beside(BlockTopology):
    """Experts from the input of a whole feed-forward block to its output: ``y = block(x) + sum_e w_e delta_e(x)``.

    An expert sees neither the activation inside the block nor its hidden features, whatever the base does there.
    """

    def steps(self, experts: int) -> tuple[Step, ...]:
        """One."""
        del experts
        return (Step(0),)

    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """What that step gives."""
        del y0
        return run(0, x).delta
