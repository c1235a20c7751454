"""Which experts work together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from molehill.molora.interfaces import Diagnostic, RouteRecord
from molehill.molora.records import stacks
from molehill.registry import register


@register(
    "diagnostic",
    "coactivation",
    paper="Lo et al. 2024, A Closer Look into Mixture-of-Experts in Large Language Models",
    url="https://arxiv.org/abs/2406.18219",
    seeds=("S105",),
)
class Coactivation(Diagnostic):
    """How often two experts are chosen for the same token.

    Attributes:
        state: Tokens by site, ``[E, E]`` float64: how many chose both; the diagonal counts every expert alone.
    """

    def shape(self, experts: int) -> tuple[int, ...]:
        """Return ``(experts, experts)``."""
        return (experts, experts)

    @torch.no_grad()
    def update(self, records: Sequence[RouteRecord]) -> None:
        """Take in the records of one forward pass."""
        for stack in stacks(records):
            counts = stack.counts.expand(len(stack.sites), -1, -1)
            both = torch.einsum("rbti,rbtj,rbt->rij", stack.selected, stack.selected, counts)
            for site, pairs in zip(stack.sites, both.to("cpu", torch.float64), strict=True):
                self.add(site.name, pairs)

    def report(self) -> dict[str, float]:
        """Return by ``site/eI/eJ`` the tokens that chose both over the tokens that chose either, 0 to 1."""
        figures: dict[str, float] = {}
        for site, pairs in self.state.items():
            alone = pairs.diagonal()
            for i in range(len(pairs)):
                for j in range(i + 1, len(pairs)):
                    either = float(alone[i] + alone[j] - pairs[i, j])
                    figures[f"{site}/e{i}/e{j}"] = float(pairs[i, j]) / either if either else 0.0
        return figures
