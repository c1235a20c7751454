"""DeepSeekMoE: more, smaller experts for the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.errors import ConfigError
from molehill.molora.interfaces import Allocation, Site, SitePlan
from molehill.registry import register


@dataclass(frozen=True)
class FineGrainedParams:
    """Parameters of `FineGrained`.

    Attributes:
        m: Pieces that every routed expert is cut into.
        k: Experts per token before cutting; the selector then takes m * k.
    """

    m: Annotated[int, Field(ge=1)] = 4
    k: Annotated[int, Field(ge=1)] = 2


@register(
    "allocation",
    "fine_grained",
    params=FineGrainedParams,
    paper="Dai et al. 2024, DeepSeekMoE",
    url="https://arxiv.org/abs/2401.06066",
    seeds=("S180", "S9"),
)
class FineGrained(Allocation):
    """m * E routed experts of rank r / m, of which m * k are chosen: as many parameters, many more combinations.

    Always-on experts stay whole, since m always-on pieces of rank r / m are one expert of rank r.
    """

    def __init__(self, params: FineGrainedParams) -> None:
        self.params = params

    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name.

        Raises:
            ConfigError: The rank cannot be cut into m equal parts.
        """
        m = self.params.m
        if rank % m:
            raise ConfigError(
                f"allocation 'fine_grained' cannot cut rank {rank} into {m} equal parts",
                where="molora.allocation",
                mend="Make molora.rank a multiple of m.",
            )
        plan = SitePlan((rank // m,) * (m * experts), (rank,) * shared, top_k=m * self.params.k)
        return {site.name: plan for site in sites}
