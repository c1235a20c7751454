"""The final model as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.registry import register
from molehill_client.making import Candidate, Company


@register("candidate", "shared_model", paper="house")
class SharedModel(Candidate):
    """The final model as everybody gets it, with what the owner kept to itself in the rounds."""

    usual = 2

    def make(self, company: Company, /) -> Sequence[Tensor]:
        """What was received."""
        return [company.received]
