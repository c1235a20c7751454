"""Experts that tell of the task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.molora.distributions import shannon
from molehill.molora.interfaces import RouteRecord, RoutingLoss
from molehill.molora.records import Stack, mean_over_records
from molehill.registry import register


@register(
    "routing_loss",
    "task_information",
    paper="Wang et al. 2025, VER: Vision Expert Transformer for Robot Learning",
    url="https://arxiv.org/abs/2510.05213",
    seeds=("S60",),
)
class TaskInformation(RoutingLoss):
    """``ln E - I``, I the information in nats between the expert of a token and its row's task, ``H(E) - H(E | task)``.

    It is 0 where every task has experts of its own and all are used alike, ln E where tasks are routed alike: also
    where rows have no tasks, or a batch has one, so that there is nothing to learn. Probabilities are means over the
    real tokens of a batch. The constant ln E is ours.
    """

    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return the mean over records."""
        return mean_over_records(records, self._loss)

    def _loss(self, stack: Stack) -> Tensor:
        counts = stack.counts
        mass = (stack.probs * counts.unsqueeze(-1)).sum(2)  # [R, B|1, E]
        tokens = counts.sum(2).expand(mass.shape[:2])
        share = tokens / tokens.sum(1, keepdim=True).clamp_min(1)
        alike = self._alike(stack, mass)
        of_task = (alike @ mass) / (alike @ tokens.unsqueeze(-1)).clamp_min(1)
        of_all = mass.sum(1) / tokens.sum(1, keepdim=True).clamp_min(1)
        information = shannon(of_all) - (share * shannon(of_task)).sum(1)
        return math.log(stack.n_experts) - information

    @staticmethod
    def _alike(stack: Stack, mass: Tensor) -> Tensor:
        """1 where two rows are of one task, ``[R, B, B]``; a route that all rows share is of one."""
        rows = mass.shape[1]
        types = [t[:rows] for record in stack.records if (t := record.types) is not None]
        if len(types) < len(stack.records):
            return mass.new_ones(len(stack.records), rows, rows)
        each = torch.stack(types)
        return (each.unsqueeze(1) == each.unsqueeze(2)).to(mass.dtype)
