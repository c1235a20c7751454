"""What objectives and rules of training give, with what is true of most of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.tasks.kind import Predicts


class Objective(ABC):
    """The loss of one pass.

    Attributes:
        alone: It cannot be computed for several clients in the same passes, so each trains by itself.
        by_class: It follows from how often its client has each class, which `begin` tells it; for tasks with classes.
        of_scores: It is a function of scores and labels, and its gradient is that function's, so the head of the frozen
            base, to which models are compared, is trained by it too; by cross-entropy otherwise.
        convex: Where it is ``of_scores``, that function is convex in the scores, so a best head can be computed.
        learns: Which predictions it can be computed for, see `molehill.tasks.kind.Kind.predicts`.
    """

    alone: ClassVar[bool] = False
    by_class: ClassVar[bool] = False
    of_scores: ClassVar[bool] = False
    convex: ClassVar[bool] = False
    learns: ClassVar[tuple[Predicts, ...]] = ("class",)

    @abstractmethod
    def __call__(self, forward: Forward) -> Tensor:
        """Return the mean over the predictions (see `Forward.mean`), in nats."""

    def begin(self, counts: Tensor) -> None:
        """Learn what it is for before its first pass; most objectives need not know.

        Args:
            counts: How often each class is a label of the client's own training rows, ``[C]`` float32.
        """
        del counts

    def personal(self) -> Objective:
        """What an owner's own part is fitted with after the rounds: the same, unless it was for what all share."""
        return self


class Regulariser(ABC):
    """What acts on the gradients of a step beside the objective."""

    @abstractmethod
    def __call__(self, grads: Tensor, values: Tensor, received: Tensor) -> None:
        """Change ``grads`` in place, given what learns and what it was when the round began; all have one shape."""
