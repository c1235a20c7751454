"""Sites that are adapted or left as they are, by a score of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molehill.molora.interfaces import Gated


class Gain(nn.Module):
    """What the weights of all experts of a site are multiplied by: 1 where its score reaches the threshold, else 0.

    Straight through: the score learns as if it were the factor itself, also where the site is off; the experts learn
    where it is on.

    Args:
        plan: Threshold and start value.

    Attributes:
        change: Of the score since the start, ``[1]`` float32; 0 is what all share where scores stay with owners.
    """

    def __init__(self, plan: Gated) -> None:
        super().__init__()
        self.threshold, self._start = plan
        self.change = nn.Parameter(torch.zeros(1))

    @property
    def score(self) -> Tensor:
        """The score ``[1]``."""
        return self._start + self.change

    @property
    def on(self) -> bool:
        """Whether the site is adapted."""
        return bool(self.score.detach() >= self.threshold)

    def forward(self) -> Tensor:
        """The factor, ``[1]``."""
        hard = (self.score.detach() >= self.threshold).to(self.change.dtype)
        return hard + (self.change - self.change.detach())
