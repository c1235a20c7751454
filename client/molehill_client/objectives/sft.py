"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register
from molehill_client.interfaces import Objective
from molehill_client.objectives.nll import nll


@register("objective", "sft", paper="house: plain cross-entropy")
class SFT(Objective):
    """Mean cross-entropy over predictions: classes of rows, or answer tokens."""

    of_scores: ClassVar[bool] = True

    def __call__(self, forward: Forward) -> Tensor:
        """Return ``mean(-log p(y))``."""
        return forward.mean(nll(forward.scores, forward.labels))
