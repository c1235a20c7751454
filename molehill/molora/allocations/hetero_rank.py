"""HMoE: experts of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from molehill.errors import ConfigError
from molehill.molora.interfaces import Allocation, Site, SitePlan
from molehill.registry import register


@dataclass(frozen=True)
class HeteroRankParams:
    """Parameters of `HeteroRank`.

    Attributes:
        kind: ``arithmetic``: as 9, 11, ..., 23 at 8 experts; ``geometric``: every expert twice the one before;
            ``hybrid``: a half of size 1, a quarter of size 2, a quarter of size 4; ``explicit``: the ranks given.
        ranks: Rank of every expert, for ``explicit``.
    """

    kind: Literal["arithmetic", "geometric", "hybrid", "explicit"] = "arithmetic"
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()

    def __post_init__(self) -> None:
        """Check that ranks are given when, and only when, they are used.

        Raises:
            ValueError: They are not.
        """
        if (self.kind == "explicit") != bool(self.ranks):
            raise ValueError("give ranks together with kind = 'explicit', and only then")


@register(
    "allocation",
    "hetero_rank",
    params=HeteroRankParams,
    paper="Wang et al. 2024, HMoE: Heterogeneous Mixture of Experts for Language Modeling",
    url="https://arxiv.org/abs/2408.10681",
    seeds=("S14",),
)
class HeteroRank(Allocation):
    """Ranks in the proportions of the kind, smallest first; their sum is that of equal experts."""

    def __init__(self, params: HeteroRankParams) -> None:
        self.params = params

    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name.

        Raises:
            ConfigError: The number of explicit ranks is not the number of experts.
        """
        if self.params.kind == "explicit" and len(self.params.ranks) != experts:
            raise ConfigError(
                f"allocation 'hetero_rank' has {len(self.params.ranks)} ranks for {experts} experts",
                where="molora.allocation",
                mend="Give one rank per expert.",
            )
        ranks = self.params.ranks or apportion(self._sizes(experts), experts * rank)
        return {site.name: SitePlan(ranks, (rank,) * shared) for site in sites}

    def _sizes(self, experts: int) -> list[int]:
        if self.params.kind == "arithmetic":
            return [experts + 1 + 2 * e for e in range(experts)]
        if self.params.kind == "geometric":
            return [2**e for e in range(experts)]
        return [1 if 2 * e < experts else 2 if 4 * e < 3 * experts else 4 for e in range(experts)]


def apportion(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Share out a budget in proportion to sizes, at least 1 each, by largest remainder.

    Args:
        sizes: Positive sizes.
        budget: Sum of the result; not below the number of sizes.

    Returns:
        Whole shares, in the order of the sizes; a larger size never gets less.
    """
    free = set(range(len(sizes)))
    while True:  # sizes whose share is below 1 get 1, and the rest is shared out anew
        left, total = budget - (len(sizes) - len(free)), sum(sizes[i] for i in free)
        small = {i for i in free if sizes[i] * left < total}
        if not small:
            break
        free -= small
    shares = [sizes[i] * left // total if i in free else 1 for i in range(len(sizes))]
    by_remainder = sorted(free, key=lambda i: (sizes[i] * left % total, sizes[i], i), reverse=True)
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return tuple(shares)
