"""The owner's whole adapter, trained on from the final model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.config import Config
from molehill.registry import register
from molehill_client.making import Candidate, Company, head_steps
from molehill_client.regularisers.fedprox import FedProx, FedProxParams


@dataclass(frozen=True)
class OwnAdapterParams:
    """Parameters of an adapter that is trained on.

    Attributes:
        steps: Optimiser steps.
        lr: Peak learning rate of the experts, which falls linearly; that of the rounds when omitted.
        pull: Strength of the pull to the shared values, ``pull / 2 * ||w - w_shared||^2``.
        along: How much of the way from the shared values is gone; all of these are tried, in this order.
    """

    steps: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] | None = None
    pull: Annotated[float, Field(ge=0)] = 0.01
    along: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.5, 1.0)


@register("candidate", "own_adapter", paper="house", params=OwnAdapterParams)
class OwnAdapter(Candidate):
    """Experts, router and head of the owner, trained on from the final model under a pull to it, or half as far.

    A change of the head is added as ``personal.head`` says.
    """

    replaces = True
    usual = 4

    def __init__(self, params: OwnAdapterParams) -> None:
        self._params = params

    def steps(self, config: Config, /) -> int:
        """Those of the adapter, and of a head that is fitted in steps after each part of the way."""
        return self._params.steps + len(self._params.along) * head_steps(config)

    def make(self, company: Company, /) -> Sequence[Tensor]:
        """What was received, moved by each part of the way."""
        params, settings = self._params, company.bench.settings()
        rates = settings.rates if params.lr is None else settings.rates._replace(experts=params.lr)
        pull = (FedProx(FedProxParams(mu=params.pull)),) if params.pull else ()
        settings = replace(
            settings, rates=rates, rules=pull, schedule="linear", decay=0.0, keys="lr of candidate own_adapter"
        )
        start = company.received
        way = company.trained(start, settings, params.steps, "adapter") - start
        return [company.personal(start + part * way, kinds=("head",)) for part in params.along]
