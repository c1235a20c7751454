"""Experts of a cluster carry the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@dataclass(frozen=True)
class ClusterVarianceParams:
    """Parameters of `ClusterVariance`.

    Attributes:
        clusters: Clusters of equal size that the experts lie in, in their order.
    """

    clusters: Annotated[int, Field(ge=1)] = 1


@register(
    "routing_loss",
    "cluster_variance",
    params=ClusterVarianceParams,
    paper="Xie et al. 2022, MoEC: Mixture of Expert Clusters",
    url="https://arxiv.org/abs/2207.09094",
)
class ClusterVariance(RoutingLoss):
    """``E mean_g Var_(e in g) P_e``: P_e the mean probability; 0 where experts of one cluster carry the same.

    How much clusters carry is free. Differs from the released code, which takes the sum over tokens for P and so grows
    with the batch.
    """

    ordered = True

    def __init__(self, params: ClusterVarianceParams) -> None:
        self._clusters = params.clusters

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        if stack.n_experts % self._clusters:
            raise ConfigError(
                f"{stack.n_experts} experts do not lie in {self._clusters} clusters of equal size",
                where="molora.losses",
                mend="Give a number of clusters that divides molora.experts.",
            )
        p = stack.mean(stack.probs).view(len(stack.records), self._clusters, -1)
        return stack.n_experts * (p - p.mean(-1, keepdim=True)).square().mean((-2, -1))
