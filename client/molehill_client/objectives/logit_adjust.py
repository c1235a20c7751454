"""Logit adjustment: a softmax that knows how often each class occurs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.registry import register
from molehill_client.interfaces import Objective


@dataclass(frozen=True)
class LogitAdjustmentParams:
    """Parameters of `LogitAdjustment`.

    Attributes:
        tau: Strength: 1 aims at the balanced error, 0 is plain cross-entropy.
        rounds_only: What an owner fits for itself after the rounds, its gate and head, is by plain cross-entropy, so
            that the owner's own classes count as often as they occur: for owners who differ in how often they have
            each class, and are judged on rows like their own. What is trained alone ends in the same way.
    """

    tau: Annotated[float, Field(ge=0)] = 1.0
    rounds_only: bool = False


@register(
    "objective",
    "logit_adjust",
    paper="Menon et al. 2021, Long-Tail Learning via Logit Adjustment",
    url="https://arxiv.org/abs/2007.07314",
    params=LogitAdjustmentParams,
)
class LogitAdjustment(Objective):
    """Cross-entropy of ``z + tau * log prior``, the prior being that of the client's own classes (equation 10).

    The model is used without the shift, so rare classes get a margin over common ones, and at ``tau = 1`` the best
    scores are those of the least balanced error. Balanced class weights aim there too, so one of both is enough. A
    class that the client does not have takes no part in its softmax, and gets no gradient from it: others teach it.
    (The authors' code adds 1e-12 to the prior, which comes to the same.)
    """

    by_class: ClassVar[bool] = True
    of_scores: ClassVar[bool] = True
    convex: ClassVar[bool] = True

    def __init__(self, params: LogitAdjustmentParams) -> None:
        self._tau, self._rounds_only = params.tau, params.rounds_only
        self._shift = torch.zeros(1)  # before `begin`: of classes that occur alike

    def begin(self, counts: Tensor) -> None:
        """See `Objective.begin`."""
        self._shift = torch.xlogy(self._tau, counts / counts.sum())  # at tau 0 it is 0, of absent classes as well

    def personal(self) -> Objective:
        """See `Objective.personal`."""
        return LogitAdjustment(LogitAdjustmentParams(tau=0.0)) if self._rounds_only else self

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of one pass."""
        return forward.mean(forward.likelihood(forward.scores + self._shift.to(forward.scores.device), forward.labels))
