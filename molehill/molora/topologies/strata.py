"""Stratified mixtures: as many experts as a token needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.steps import BlockTopology, Run, Step
from molehill.registry import register


@dataclass(frozen=True)
class StrataParams:
    """Parameters of `Strata`.

    Attributes:
        strata: L; experts are dealt to them in equal numbers, the first to the first.
    """

    strata: Annotated[int, Field(ge=1, le=8)] = 2


@register(
    "topology",
    "strata",
    params=StrataParams,
    paper="Xu et al. 2023, Towards Being Parameter-Efficient: A Stratified Sparsely Activated Transformer with "
    "Dynamic Capacity",
    url="https://arxiv.org/abs/2305.02176",
)
class Strata(BlockTopology):
    """Experts in strata beside a block; a token climbs from the stratum it was sent to, so it has one expert to L.

    Gate i sees the experts of stratum i and above. A token whose best expert there is of stratum j goes on, with what
    that made of it, to gate j + 1, and is done after the last. Every pass is computed for all tokens, and adds nothing
    to those that are not at its gate.
    """

    ordered = True

    def __init__(self, params: StrataParams) -> None:
        self._strata = params.strata

    def steps(self, experts: int) -> tuple[Step, ...]:
        """One for every stratum, through one bank of which the lower strata are closed.

        Raises:
            ConfigError: The strata do not divide the experts.
        """
        size, rest = divmod(experts, self._strata)
        if rest or not size:
            raise ConfigError(
                f"{experts} experts cannot be dealt to {self._strata} strata in equal numbers",
                where="molora.experts, molora.topology.strata",
                mend="Give a multiple.",
            )
        return tuple(Step(0, first=stratum * size) for stratum in range(self._strata))

    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """The sum over passes."""
        total = torch.zeros_like(y0)
        gate = torch.zeros(*x.shape[:2], 1, device=x.device, dtype=torch.int64)  # that a token comes to next
        for stratum in range(self._strata):
            here = gate == stratum
            found = run(stratum, x + total, here.float())
            total = total + found.delta
            if found.weights is not None:
                size = found.weights.shape[-1] // self._strata
                reached = found.weights.argmax(-1, keepdim=True) // size
                gate = torch.where(here, reached + 1, gate)
        return total
