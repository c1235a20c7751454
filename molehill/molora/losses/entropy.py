"""Entropy of the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from molehill.molora.distributions import shannon, tsallis
from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@dataclass(frozen=True)
class EntropyParams:
    """Parameters of `Entropy`.

    Attributes:
        kind: ``shannon`` in nats (top-p, HMoE), or ``tsallis`` over its largest value (DynMoLE).
        q: Order of the Tsallis entropy; not 1.
    """

    kind: Literal["shannon", "tsallis"] = "shannon"
    q: Annotated[float, Field(gt=0)] = 1.1

    def __post_init__(self) -> None:
        """Refuse the order that the formula does not have.

        Raises:
            ValueError: ``q`` is 1.
        """
        if self.q == 1:
            raise ValueError("q must not be 1; take kind 'shannon'")


@register(
    "routing_loss",
    "entropy",
    params=EntropyParams,
    paper="Huang et al. 2024, Harder Tasks Need More Experts; tsallis: Li et al. 2025, DynMoLE",
    url="https://arxiv.org/abs/2403.07652",
    seeds=("S8", "S14", "Z1"),
)
class Entropy(RoutingLoss):
    """Mean entropy of the router's distribution: keeps a router that picks by mass from spreading over ever more."""

    def __init__(self, params: EntropyParams) -> None:
        self.params = params

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        p = stack.probs
        return stack.mean(shannon(p) if self.params.kind == "shannon" else tsallis(p, self.params.q))
