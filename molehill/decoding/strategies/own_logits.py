"""The model's own logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from molehill.catalogue import register
from molehill.decoding.interfaces import Passes, Scores, Strategy


@register("decoding", "own_logits", paper="house: one pass, the model's own logits")
class OwnLogits(Strategy):
    """One pass for each token, as the model was trained: greedy at temperature 0, else sampling."""

    own = True
    neutral: ClassVar[Mapping[str, Any]] = {}

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:  # noqa: ARG002  (of the interface)
        """See `Strategy.begin`."""
        return passes.logits
