"""Dynamic fine-tuning: cross-entropy rescaled by the model's own probability."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register
from molehill_client.interfaces import Objective


@register(
    "objective",
    "dft",
    paper="Wu et al. 2025, On the Generalization of SFT: A Reinforcement Learning Perspective with Reward "
    "Rectification",
    url="https://arxiv.org/abs/2508.05629",
    seeds=("S150",),
)
class DFT(Objective):
    """``mean(sg(p(y)) * -log p(y))``; its gradient is p(y) times that of cross-entropy."""

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of one pass."""
        loss = forward.nll()
        return forward.mean(loss.detach().neg().exp() * loss)
