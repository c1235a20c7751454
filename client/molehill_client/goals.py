"""What a client minimises: the run's objective, and what follows of how often the client has each class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molehill.molora.forward import Forward
from molehill_client.interfaces import Objective


@dataclass(frozen=True)
class Goal:
    """What one client minimises.

    Attributes:
        objective: Loss of a pass, which knows what it has to of the client.
        weights: How much a prediction counts by its class, ``[C]`` float32; None where all count alike.
    """

    objective: Objective
    weights: Tensor | None = None

    def __call__(self, forward: Forward) -> Tensor:
        """Return the loss of the client's part of a pass, in nats."""
        return self.objective(self._weighed(forward))

    def of_scores(self, forward: Forward) -> Tensor:
        """The loss of scores of the frozen base: the objective's where it follows from them, else the likelihood's."""
        if self.objective.of_scores:
            return self(forward)
        return self._weighed(forward).mean(forward.nll())

    def _weighed(self, forward: Forward) -> Forward:
        return forward if self.weights is None else replace(forward, weights=self.weights[forward.labels])


def balanced(counts: Tensor) -> Tensor:
    """Weights by which all classes that occur count alike, and a prediction 1 on average.

    Args:
        counts: How often each class occurs, ``[C]``.

    Returns:
        ``n / (classes that occur * count)``, ``[C]`` float32, as scikit-learn has it; 0 for one that does not occur.
    """
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0).float()
