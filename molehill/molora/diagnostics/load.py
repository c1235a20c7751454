"""Where tokens went."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.molora.distributions import shannon
from molehill.molora.interfaces import Diagnostic, RouteRecord
from molehill.molora.records import stacks
from molehill.registry import register


@register(
    "diagnostic",
    "load",
    paper="Shazeer et al. 2017, Outrageously Large Neural Networks; violation: Wang et al. 2024, Loss-Free Balancing",
    url="https://arxiv.org/abs/2408.15664",
    seeds=("S105",),
)
class Load(Diagnostic):
    """Tokens per expert, by gate mass and by choice, entropy of the router, and how uneven the choice is.

    Attributes:
        state: Sums by site, ``[2E + 2]`` float64: gate mass, choices, entropy in nats, tokens.
    """

    def shape(self, experts: int) -> tuple[int, ...]:
        """Return ``(2 * experts + 2,)``."""
        return (2 * experts + 2,)

    @torch.no_grad()
    def update(self, records: Sequence[RouteRecord]) -> None:
        """Take in the records of one forward pass."""
        for stack in stacks(records):
            tokens = stack.counts.sum((1, 2)).expand(len(stack.sites))
            entropy = stack.sum(shannon(stack.probs))
            sums = torch.cat(
                [stack.sum(stack.weights), stack.sum(stack.selected), entropy[:, None], tokens[:, None]], dim=1
            )
            for site, row in zip(stack.sites, sums.to("cpu", torch.float64), strict=True):
                self.add(site.name, row)

    def report(self) -> dict[str, float]:
        """Return figures by ``site/figure``.

        ``mass/eN`` and ``chosen/eN`` are parts of all tokens, ``entropy`` is a mean in nats, ``violation`` is the
        largest expert's choices over the mean, less 1 (0 when balanced, E - 1 when one expert takes all).
        """
        figures: dict[str, float] = {}
        for site, row in self.state.items():
            n = _experts(row)
            tokens = max(float(row[-1]), 1.0)
            chosen = row[n : 2 * n]
            figures |= {f"{site}/mass/e{e}": float(row[e]) / tokens for e in range(n)}
            figures |= {f"{site}/chosen/e{e}": float(chosen[e]) / tokens for e in range(n)}
            figures[f"{site}/entropy"] = float(row[-2]) / tokens
            figures[f"{site}/violation"] = float(chosen.max() / chosen.mean().clamp_min(1e-12)) - 1
        return figures


def _experts(row: Tensor) -> int:
    return (len(row) - 2) // 2
