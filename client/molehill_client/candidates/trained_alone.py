"""What the owner would have without the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.config import Config
from molehill.registry import register
from molehill_client.making import Candidate, Company, head_steps


@dataclass(frozen=True)
class TrainedAloneParams:
    """Parameters of an adapter that is trained alone.

    Attributes:
        steps: Optimiser steps; as many as all rounds when omitted.
        lr: Learning rate of the experts; that of the rounds when omitted.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None


@register("candidate", "trained_alone", paper="house", params=TrainedAloneParams)
class TrainedAlone(Candidate):
    """The adapter trained on the owner's rows alone, from the start values, for as many steps as the run gives it.

    It is what ``local`` is in the scores. A change of the head is added as ``personal.head`` says.
    """

    replaces = True
    starts_over = True
    usual = 5

    def __init__(self, params: TrainedAloneParams) -> None:
        self._params = params

    def _own(self, config: Config) -> int:
        return self._params.steps or config.run.rounds * config.train.steps

    def steps(self, config: Config, /) -> int:
        """Those of the adapter, and those of a head that is fitted in steps."""
        return self._own(config) + head_steps(config)

    def make(self, company: Company, /) -> Sequence[Tensor]:
        """The start values, trained."""
        settings = company.bench.settings()
        if self._params.lr is not None:
            rates = settings.rates._replace(experts=self._params.lr)
            settings = replace(settings, rates=rates, keys="lr of candidate trained_alone")
        made = company.trained(company.started(), settings, self._own(company.bench.config), "alone", routed=True)
        return [company.personal(made, kinds=("head",))]
