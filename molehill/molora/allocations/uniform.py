"""The same at every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molehill.molora.interfaces import Allocation, Site, SitePlan
from molehill.registry import register


@register("allocation", "uniform", paper="house: the same number of experts of one rank at every site")
class Uniform(Allocation):
    """Every site gets the configured experts, shared experts and rank."""

    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name."""
        return {site.name: SitePlan((rank,) * experts, (rank,) * shared) for site in sites}
