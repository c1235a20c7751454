"""Dynamic fine-tuning: cross-entropy rescaled by the model's own probability."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register


@register(
    "objective",
    "dft",
    paper="Wu et al. 2025, On the Generalization of SFT: A Reinforcement Learning Perspective with Reward "
    "Rectification",
    url="https://arxiv.org/abs/2508.05629",
    seeds=("S150",),
)
class DFT:
    """``mean(sg(p(y)) * -log p(y))``; its gradient is p(y) times that of cross-entropy."""

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of one pass."""
        nll = F.cross_entropy(forward.logits, forward.labels, reduction="none")
        return (nll.detach().neg().exp() * nll).mean()
