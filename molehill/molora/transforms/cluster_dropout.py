"""Dropout of a part of every cluster of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.interfaces import LogitTransform, RouteContext
from molehill.registry import register


@dataclass(frozen=True)
class ClusterDropoutParams:
    """Parameters of `ClusterDropout`.

    Attributes:
        clusters: Clusters of equal size that the experts lie in, in their order.
        p: Part of every cluster that is closed, rounded down; one expert of each stays open.
        draws: How often in the course of training others are closed.
    """

    clusters: Annotated[int, Field(ge=1)] = 1
    p: Annotated[float, Field(ge=0, lt=1)] = 0.5
    draws: Annotated[int, Field(ge=1)] = 8


@register(
    "transform",
    "cluster_dropout",
    params=ClusterDropoutParams,
    paper="Xie et al. 2022, MoEC: Mixture of Expert Clusters",
    url="https://arxiv.org/abs/2207.09094",
)
class ClusterDropout(LogitTransform):
    """In training a part of the experts of every cluster is closed, the same at all sites, and others after a while.

    No cluster is ever closed as a whole, as dropout of single experts may do. Differs from the paper, which draws every
    250 updates: which are closed follows from the course of training.
    """

    by_logits = True

    def __init__(self, params: ClusterDropoutParams) -> None:
        self.params = params

    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits of the same shape.

        Raises:
            ConfigError: The clusters do not divide the experts.
        """
        clusters = self.params.clusters
        size, rest = divmod(z.shape[-1], clusters)
        if rest or not size:
            raise ConfigError(
                f"{z.shape[-1]} experts do not lie in {clusters} clusters of equal size",
                where="molora.transforms",
                mend="Give a number of clusters that divides molora.experts.",
            )
        count = min(int(size * self.params.p), size - 1)
        if not (ctx.training and count):
            return z
        draw = min(int(ctx.progress * self.params.draws), self.params.draws - 1)
        generator = torch.Generator().manual_seed(draw)
        order = torch.rand(clusters, size, generator=generator).argsort(-1)
        return z.masked_fill((order < count).flatten().to(z.device), torch.finfo(z.dtype).min)
