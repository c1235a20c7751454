"""The final model with residuals."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molehill.config import Config
from molehill.registry import register
from molehill_client.making import Candidate, Company


@register("candidate", "fitted_model", paper="house")
class FittedModel(Candidate):
    """The final model with the residuals that ``personal.gate`` and ``personal.head`` say, see docs/adr/0004."""

    usual = 1

    def steps(self, config: Config, /) -> int:
        """Those of ``personal.steps``."""
        return config.personal.steps

    def make(self, company: Company, /) -> Sequence[Tensor]:
        """What was received, with residuals."""
        return [company.personal(company.received)]
