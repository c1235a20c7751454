"""Direct preference optimisation: the chosen answer is to gain on the rejected one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.molora.pairs import margins
from molehill.registry import register
from molehill_client.interfaces import Objective


@dataclass(frozen=True)
class DPOParams:
    """Parameters of DPO.

    Attributes:
        beta: How dear it is to leave the reference: the margin counts this many times.
    """

    beta: Annotated[float, Gt(0)] = 0.1


@register(
    "objective",
    "dpo",
    paper="Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    url="https://arxiv.org/abs/2305.18290",
    params=DPOParams,
)
class DPO(Objective):
    """``-log sigmoid(beta * (log p/p_ref (chosen) - log p/p_ref (rejected)))`` (equation 7), the mean over pairs.

    The reference is the base with all adapters off, so it needs no second model, and one more forward pass a step.
    """

    learns = ("pair",)

    def __init__(self, params: DPOParams) -> None:
        self.beta = params.beta

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of one pass."""
        return -F.logsigmoid(self.beta * margins(forward)).mean()
