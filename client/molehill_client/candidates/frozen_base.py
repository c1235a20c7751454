"""The frozen base with a head of the owner's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.config import Config
from molehill.registry import register
from molehill_client.making import Candidate, Company, head_steps


@register("candidate", "frozen_base", paper="house")
class FrozenBase(Candidate):
    """The base without anything that was trained, and the head that ``personal.head`` says, sought from nothing.

    With ``head = "convex"`` it is what ``base`` is in the scores.
    """

    replaces = True
    starts_over = True
    usual = 3
    heads = True

    def steps(self, config: Config, /) -> int:
        """Those of a head that is fitted in steps."""
        return head_steps(config)

    def make(self, company: Company, /) -> Sequence[Tensor]:
        """The start values, of which the base's output is that of the model, with a head."""
        values = company.started()
        model = company.bench.model
        for slot in (slot for key, slot in model.slots.items() if key.kind == "head" and not key.residual):
            values[:, slot.start : slot.stop] = 0.0
        # The base has learnt nothing of these rows, so that rows left out of a fit look as others do.
        return [company.personal(values, kinds=("head",), seen=False)]
