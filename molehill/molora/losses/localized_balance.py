"""LoRAMoE's localized balancing constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.losses.importance_cv2 import cv2
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@dataclass(frozen=True)
class LocalizedBalanceParams:
    """Parameters of `LocalizedBalance`.

    Attributes:
        delta: How far experts of the row's own type are set apart from the others.
        types: Number of types; the experts are dealt to them in equal runs, and a row's type is its task id modulo
            this number.
    """

    delta: Annotated[float, Field(gt=-1, lt=1)] = 0.1
    types: Annotated[int, Field(ge=1)] = 2


@register(
    "routing_loss",
    "localized_balance",
    params=LocalizedBalanceParams,
    paper="Dou et al. 2023, LoRAMoE",
    url="https://arxiv.org/abs/2312.09979",
    seeds=("S20",),
)
class LocalizedBalance(RoutingLoss):
    """``var(Q * I) / mean(Q * I)^2``, Q ``[B, E]`` the mean gate of every row, I 1 + delta on its own type's experts.

    I is 1 - delta on the others, so the loss is 0 where Q is proportional to 1 / I: with the paper's sign a row's own
    experts then carry the smaller part; a negative delta asks for the larger one. The means of Q leave padding out
    (the released code sums over it). Rows without a type are balanced over all experts, as with delta 0.
    """

    def __init__(self, params: LocalizedBalanceParams) -> None:
        self.params = params

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        counts = stack.counts
        tokens = counts.sum(2)
        q = (stack.weights * counts.unsqueeze(-1)).sum(2) / tokens.clamp_min(1).unsqueeze(-1)
        if stack.records[0].types is not None:
            q = q * self._importance(torch.stack([t for r in stack.records if (t := r.types) is not None]), q)
        real = (tokens > 0).to(q.dtype).unsqueeze(-1).expand_as(q)
        return cv2(q.flatten(1), real.flatten(1))

    def _importance(self, types: Tensor, q: Tensor) -> Tensor:
        """Return I ``[R, B, E]`` for the types ``[R, B]`` of the rows."""
        n_experts, n_types = q.shape[-1], self.params.types
        owner = torch.arange(n_experts, device=q.device) * n_types // n_experts
        own = owner == (types % n_types).unsqueeze(-1)
        return 1 + self.params.delta * (own.to(q.dtype) * 2 - 1)
