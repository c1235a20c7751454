"""MoLA: more experts in higher layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.molora.interfaces import Allocation, Site, SitePlan
from molehill.registry import register


@dataclass(frozen=True)
class ByDepthParams:
    """Parameters of `ByDepth`.

    Attributes:
        experts: Routed experts in each of as many equal groups of layers, bottom to top.
    """

    experts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (2, 4, 6, 8)


@register(
    "allocation",
    "by_depth",
    params=ByDepthParams,
    paper="Gao et al. 2024, Higher Layers Need More LoRA Experts (MoLA)",
    url="https://arxiv.org/abs/2402.08562",
    seeds=("S113",),
)
class ByDepth(Allocation):
    """The layers are cut into as many groups as numbers are given; every site of a group gets that many experts.

    The paper's shapes have one total: 2-4-6-8 (best), 8-6-4-2, 2-8-8-2, 8-2-2-8, 5-5-5-5. The configured
    number of experts does not count.
    """

    def __init__(self, params: ByDepthParams) -> None:
        self.experts = params.experts

    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name."""
        del experts
        return {site.name: SitePlan((rank,) * self._at(site), (rank,) * shared) for site in sites}

    def _at(self, site: Site) -> int:
        return self.experts[min(site.layer * len(self.experts) // site.n_layers, len(self.experts) - 1)]
