"""What one forward pass gives to objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from molehill.molora.interfaces import RouteRecord
from molehill.molora.records import by_client


@dataclass
class Forward:
    """What an objective sees of one forward pass.

    Attributes:
        scores: One row per prediction, ``[M, C]`` in the model's type: per input row (classification) or per answer
            token. The largest tensor of a causal LM's pass, which a float32 copy would double or triple.
        labels: ``[M]`` int64.
        rows: Input row of every prediction, ``[M]`` int64.
        records: Routes of the pass, when they were asked for.
        reference: Runs the same batch with all adapters off and returns ``[M, C]`` without gradient.
        weights: How much every prediction counts, ``[M]``; None where all count alike.
    """

    scores: Tensor
    labels: Tensor
    rows: Tensor
    records: list[RouteRecord]
    reference: Callable[[], Tensor]
    weights: Tensor | None = None

    def mean(self, each: Tensor) -> Tensor:
        """The mean of a number per prediction, ``[M]``, by the weights: ``sum(w x) / sum(w)``."""
        return each.mean() if self.weights is None else (self.weights * each).sum() / self.weights.sum()

    @property
    def logits(self) -> Tensor:
        """The scores in float32 (float64 stays)."""
        return self.scores.to(torch.promote_types(self.scores.dtype, torch.float32))

    def by_client(self, clients: int, batch_size: int) -> list[Forward]:
        """The part of every client of a batch whose rows are equal runs, one per client.

        Args:
            clients: Number of clients.
            batch_size: Rows of each.
        """
        if clients == 1:
            return [self]
        counts = torch.bincount(self.rows // batch_size, minlength=clients).tolist()
        records = by_client(self.records, clients)
        references = cache(lambda: torch.split(self.reference(), counts))
        columns = (*(torch.split(part, counts) for part in (self.scores, self.labels, self.rows)), records)
        return [
            Forward(scores, labels, rows - c * batch_size, mine, lambda c=c: references()[c])  # type: ignore[misc]  # a default binds c
            for c, (scores, labels, rows, mine) in enumerate(zip(*columns, strict=True))
        ]
