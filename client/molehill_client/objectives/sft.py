"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register
from molehill_client.interfaces import Objective


@register("objective", "sft", paper="house: plain maximum likelihood")
class SFT(Objective):
    """Mean negative log-likelihood over predictions: cross-entropy of classes or tokens, half a squared error."""

    learns = ("class", "flags", "number")

    of_scores: ClassVar[bool] = True
    convex: ClassVar[bool] = True

    def __call__(self, forward: Forward) -> Tensor:
        """Return ``mean(-log p(y))``."""
        return forward.mean(forward.nll())
