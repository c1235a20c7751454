"""What one forward pass gives to objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from molehill.molora.interfaces import RouteRecord
from molehill.molora.likelihoods import Likelihood, of_class
from molehill.molora.records import by_client


@dataclass
class Forward:
    """What an objective sees of one forward pass.

    Attributes:
        scores: One row per prediction, ``[M, C]`` in the model's type: per input row (classification) or per answer
            token. The largest tensor of a causal LM's pass, which a float32 copy would double or triple.
        labels: Of every prediction: ``[M]`` int64 classes or tokens, ``[M]`` numbers, or ``[M, C]`` of what is there.
        rows: Input row of every prediction, ``[M]`` int64.
        records: Routes of the pass, when they were asked for.
        reference: Runs the same batch with all adapters off and returns ``[M, C]`` without gradient.
        likelihood: How likely the labels are, given the scores.
        weights: How much every prediction counts, ``[M]``; None where all count alike.
    """

    scores: Tensor
    labels: Tensor
    rows: Tensor
    records: list[RouteRecord]
    reference: Callable[[], Tensor]
    likelihood: Likelihood = of_class
    weights: Tensor | None = None

    def nll(self) -> Tensor:
        """Return ``-log p(label)`` of every prediction, ``[M]``, in nats."""
        return self.likelihood(self.scores, self.labels)

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
            replace(
                self,
                scores=scores,
                labels=labels,
                rows=rows - c * batch_size,
                records=mine,
                reference=partial(_part, references, c),
            )
            for c, (scores, labels, rows, mine) in enumerate(zip(*columns, strict=True))
        ]


def _part(all_of: Callable[[], Sequence[Tensor]], client: int) -> Tensor:
    return all_of()[client]
