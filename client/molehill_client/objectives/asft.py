"""Anchored supervised fine-tuning: DFT with a pull to the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register
from molehill_client.interfaces import Objective
from molehill_client.objectives.dft import DFT


@dataclass(frozen=True)
class ASFTParams:
    """Parameters of ASFT.

    Attributes:
        coef: Weight of the KL term.
    """

    coef: float = 0.1


@register(
    "objective",
    "asft",
    paper="Zhu et al. 2025, Anchored Supervised Fine-Tuning",
    url="https://arxiv.org/abs/2509.23753",
    seeds=("S166",),
    params=ASFTParams,
)
class ASFT(Objective):
    """``DFT + coef * mean KL(reference || model)``; the reference is the base with all adapters off."""

    def __init__(self, params: ASFTParams) -> None:
        self.coef = params.coef
        self._dft = DFT()

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of one pass (runs the base once more unless ``coef`` is 0)."""
        loss = self._dft(forward)
        if self.coef == 0:
            return loss
        reference = F.log_softmax(forward.reference(), -1)
        kl = F.kl_div(F.log_softmax(forward.logits, -1), reference, log_target=True, reduction="none").sum(-1)
        return loss + self.coef * forward.mean(kl)
