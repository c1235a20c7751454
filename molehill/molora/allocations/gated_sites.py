"""Every site with a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.molora.interfaces import Allocation, Gated, Site, SitePlan
from molehill.registry import register


@dataclass(frozen=True)
class GatedSitesParams:
    """Parameters of `GatedSites`.

    Attributes:
        threshold: tau; a site whose score is below it is left as the base has it.
        start: Scores at the start.
    """

    threshold: Annotated[float, Field(gt=0)] = 0.1
    start: Annotated[float, Field(gt=0)] = 0.15


@register(
    "allocation",
    "gated_sites",
    params=GatedSitesParams,
    paper="Wallingford et al. 2022, Task Adaptive Parameter Sharing for Multi-Task Learning",
    url="https://arxiv.org/abs/2203.16708",
)
class GatedSites(Allocation):
    """The same experts at every site, each of which finds out whether it is to be adapted at all.

    A site's score is its owner's own, where a gate is anchored or split. With the loss ``site_l1`` scores fall where
    adapting does not pay.
    """

    def __init__(self, params: GatedSitesParams) -> None:
        self._gated = Gated(params.threshold, params.start)

    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name."""
        plan = SitePlan((rank,) * experts, (rank,) * shared, gated=self._gated)
        return {site.name: plan for site in sites}
