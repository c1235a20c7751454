"""Scores from logits, added up batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.errors import DataError, TrainingError
from molehill.plan import Scores


class ScoreSum:
    """Counts over batches; the order of the batches does not matter.

    Args:
        classes: Number of classes; None for causal LM, where F1 over the vocabulary means nothing.
    """

    def __init__(self, classes: int | None = None) -> None:
        self._n = 0
        self._right = 0
        self._loss = 0.0
        self._confusion = None if classes is None else torch.zeros(classes, classes, dtype=torch.int64)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            logits: ``[N, C]``, any float type.
            labels: ``[N]`` int64 in [0, C): a class per row, or the answer token each position predicts.
        """
        predicted = logits.argmax(-1)
        self._n += len(labels)
        self._right += int((predicted == labels).sum())
        self._loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        if self._confusion is not None:
            size = len(self._confusion)
            counts = torch.bincount(labels * size + predicted, minlength=size * size)
            self._confusion += counts.reshape(size, size).cpu()

    def scores(self) -> Scores:
        """Accuracy, macro-F1 over the classes that occur in truth or prediction, and mean cross-entropy.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        if not self._n:
            raise DataError("there is nothing to score", mend="Give every client held-out rows.")
        if not math.isfinite(self._loss):
            raise TrainingError(
                f"the loss on held-out rows is {self._loss}", mend="Lower train.lr, or set base.precision to fp32."
            )
        accuracy, loss = self._right / self._n, self._loss / self._n
        return Scores(n=self._n, accuracy=accuracy, macro_f1=self._macro_f1(), loss=loss)

    def _macro_f1(self) -> float | None:
        if self._confusion is None:
            return None
        both = self._confusion.sum(0) + self._confusion.sum(1)  # 2 tp + fp + fn per class
        occurs = both > 0
        return float((2 * self._confusion.diag()[occurs] / both[occurs]).double().mean())
