"""Poly and MHR: logits looked up by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@dataclass(frozen=True)
class TaskTableParams:
    """Parameters of `TaskTable`.

    Attributes:
        tasks: Rows of the table; a row's task is its place among the data's task names. One suits a federation in
            which every client is a task of its own and keeps its gate.
        splits: Heads; each has its own logits for its own block of A's and B's features. 1 is Poly, more is MHR.
        scale: Start values are U(-scale, scale).
    """

    tasks: Annotated[int, Field(ge=1)] = 1
    splits: Annotated[int, Field(ge=1)] = 1
    scale: Annotated[float, Field(ge=0)] = 1e-3


@register(
    "scorer",
    "task_table",
    params=TaskTableParams,
    paper="Ponti et al. 2022, Combining Modular Skills (Poly); Caccia et al. 2023, Multi-Head Adapter Routing (MHR)",
    url="https://arxiv.org/abs/2211.03831",
    seeds=("S118",),
)
class TaskTable(Scorer):
    """One row of logits per task, for every head; the input itself does not matter.

    A task that is not in the table (or no task at all) gets the mean row.

    Attributes:
        table: ``[tasks, splits, E]`` float32.
    """

    level = "row"

    def __init__(self, params: TaskTableParams, *, d_in: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.heads = params.splits
        self.reads = frozenset({"task_ids"}) if params.tasks > 1 else frozenset()  # one row is all there is to choose
        self.table = nn.Parameter(torch.empty(params.tasks, params.splits, n_experts))
        nn.init.uniform_(self.table, -params.scale, params.scale)

    def axes(self) -> Mapping[str, int]:
        """The last."""
        return {"table": 2}

    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, 1, E]``, or ``[B, 1, H, E]`` with several heads; B is 1 when there are no task ids."""
        tasks = self.table.shape[0]
        rows = torch.cat([self.table, self.table.mean(0, keepdim=True)])
        if ctx.task_ids is None:
            z = rows[tasks:]
        else:
            known = (ctx.task_ids >= 0) & (ctx.task_ids < tasks)
            z = rows[torch.where(known, ctx.task_ids, tasks)]
        return z.unsqueeze(1) if self.heads > 1 else z
