"""Supervised fine-tuning."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register


@register("objective", "sft", paper="house: plain cross-entropy")
class SFT:
    """Mean cross-entropy over predictions: classes of rows, or answer tokens."""

    def __call__(self, forward: Forward) -> Tensor:
        """Return ``mean(-log p(y))``."""
        return F.cross_entropy(forward.logits, forward.labels)
