"""A small network on an embedding of the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class TaskMLPParams:
    """Parameters of `TaskMLP`.

    Attributes:
        tasks: Embeddings; a row's task is its place among the data's task names. One suits a federation in which every
            client is a task of its own.
        width: Features of an embedding.
        hidden: Hidden features of the network.
    """

    tasks: Annotated[int, Field(ge=1)] = 1
    width: Annotated[int, Field(ge=1)] = 64
    hidden: Annotated[int, Field(ge=1)] = 128


@register(
    "scorer",
    "task_mlp",
    params=TaskMLPParams,
    paper="Ye, Zha and Ren 2022, Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts",
    url="https://arxiv.org/abs/2205.12701",
)
class TaskMLP(Scorer):
    """Two linears with a GELU between them, on a learnt embedding of the task; the input itself does not matter.

    The embeddings stay with their client where a gate is split, so that a new client is a few numbers. A task that is
    not known (or no task at all) gets their mean.

    Attributes:
        embedding: ``[tasks, width]`` float32.
        inner: ``[hidden, width]``; inner_bias: ``[hidden]``.
        outer: ``[E, hidden]``; outer_bias: ``[E]``.
    """

    level = "row"
    own = frozenset({"embedding"})

    def __init__(self, params: TaskMLPParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        del d_in
        self.n_experts = n_experts
        self.reads = frozenset({"task_ids"}) if params.tasks > 1 else frozenset()  # one is all there is to choose
        self.embedding = nn.Parameter(torch.randn(params.tasks, params.width))
        self.inner = nn.Parameter(torch.randn(params.hidden, params.width) / params.width**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(params.hidden))
        self.outer = nn.Parameter(torch.randn(n_experts, params.hidden) / params.hidden**0.5)
        self.outer_bias = nn.Parameter(torch.zeros(n_experts))

    def axes(self) -> Mapping[str, int]:
        """Rows of the last linear."""
        return {"embedding": -1, "inner": -1, "inner_bias": -1, "outer": 0, "outer_bias": 0}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, 1, E]``; B is 1 when there are no task ids."""
        tasks = self.embedding.shape[0]
        rows = torch.cat([self.embedding, self.embedding.mean(0, keepdim=True)])
        if ctx.task_ids is None:
            rows = rows[tasks:]
        else:
            known = (ctx.task_ids >= 0) & (ctx.task_ids < tasks)
            rows = rows[torch.where(known, ctx.task_ids, tasks)]
        hidden = F.gelu(rows @ self.inner.T + self.inner_bias)
        return (hidden @ self.outer.T + self.outer_bias).unsqueeze(1)
