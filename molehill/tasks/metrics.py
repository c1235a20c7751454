"""Scores from logits, added up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name everybody uses)

from molehill.errors import DataError, TrainingError
from molehill.plan import Scores


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts that add up over batches, clients and stages.

    Attributes:
        n: Labels seen.
        right: Of these, predicted right.
        loss: Sum of their cross-entropies in nats.
        confusion: ``[C, C]`` counts by (truth, prediction); None when F1 over classes means nothing (causal LM).
    """

    n: int = 0
    right: int = 0
    loss: float = 0.0
    confusion: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, *, classes: bool) -> Tally:
        """Count one batch.

        Args:
            logits: ``[N, C]``, any float type.
            labels: ``[N]`` int64 in [0, C).
            classes: Keep the confusion matrix.
        """
        with torch.no_grad():
            loss = F.cross_entropy(logits.float(), labels, reduction="sum").item()
            predicted = logits.argmax(-1)
            confusion = None
            if classes:
                size = logits.shape[-1]
                counts = torch.bincount(labels * size + predicted, minlength=size * size)
                confusion = counts.reshape(size, size).cpu().numpy()
            return cls(len(labels), int((predicted == labels).sum()), loss, confusion)

    def __add__(self, other: Tally) -> Tally:
        counts: list[NDArray[Any]] = [t.confusion for t in (self, other) if t.confusion is not None]
        confusion = sum(counts[1:], counts[0]) if counts else None
        return Tally(self.n + other.n, self.right + other.right, self.loss + other.loss, confusion)

    def scores(self) -> Scores:
        """Accuracy, macro-F1 over the classes that occur in truth or prediction, and mean cross-entropy.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        if not self.n:
            raise DataError("there is nothing to score", mend="Give every client held-out rows.")
        if not math.isfinite(self.loss):
            raise TrainingError(
                f"the loss on held-out rows is {self.loss}", mend="Lower train.lr, or set base.precision to fp32."
            )
        return Scores(n=self.n, accuracy=self.right / self.n, macro_f1=self._macro_f1(), loss=self.loss / self.n)

    def _macro_f1(self) -> float | None:
        if self.confusion is None:
            return None
        both = self.confusion.sum(0) + self.confusion.sum(1)  # 2 tp + fp + fn per class
        return float(np.mean(2 * np.diag(self.confusion)[both > 0] / both[both > 0]))
