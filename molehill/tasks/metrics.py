"""Scores from logits, added up batch by batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.errors import DataError, TrainingError
from molehill.intervals import of_bounded, of_mean, of_share
from molehill.molora.forward import Forward
from molehill.plan import Scores
from molehill.tasks.measures import ACCURACY, LOSS, MACRO_F1, Measure
from molehill.tasks.outcomes import Outcomes, Parts


def require_scores(n: int, loss: float) -> None:
    """Refuse what gives no scores.

    Args:
        n: Predictions.
        loss: Sum or mean of their losses.

    Raises:
        DataError: Nothing was counted.
        TrainingError: The loss is not finite.
    """
    if not n:
        raise DataError("there is nothing to score", mend="Give every client held-out rows.")
    if not math.isfinite(loss):
        what = f"the loss on held-out rows is {loss}"
        raise TrainingError(what, mend="Lower train.lr, or set base.precision to fp32.")


class ScoreSum:
    """Counts over batches; the order of the batches does not matter.

    Args:
        classes: Number of classes; None for causal LM, where F1 over the vocabulary means nothing.
        accuracy: As which measure the task declares the accuracy.
    """

    found = None

    def __init__(self, classes: int | None = None, accuracy: Measure = ACCURACY) -> None:
        self._accuracy = accuracy
        self._n = 0
        self._rows = 0
        self._sums = torch.zeros(3, dtype=torch.float64)  # over predictions: 1, right, loss
        self._products = torch.zeros(3, 3, dtype=torch.float64)  # the same of every row times themselves
        self._each: list[Tensor] = []  # the same of every row
        self._places: list[Tensor] = []  # of every prediction its row, what is there and what is said
        self._confusion = None if classes is None else torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, forward: Forward) -> None:
        """Count one batch: a class per row, or the answer token each position predicts.

        What is of one row goes together, so that many tokens of few rows say less than as many rows.
        """
        self.count(forward.logits, forward.labels, forward.rows)

    @torch.no_grad()
    def count(self, logits: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        """Count predictions.

        Args:
            logits: ``[N, C]``, any float type.
            labels: ``[N]`` int64 in [0, C).
            rows: Which row of the batch each is of, ``[N]`` int64; each is a row of its own when None.
        """
        predicted = logits.argmax(-1)
        losses = -F.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1))[:, 0]
        each = torch.stack([torch.ones_like(losses), (predicted == labels).float(), losses], 1).double().cpu()
        places = torch.arange(len(labels))
        if rows is not None:
            _, places = torch.unique(rows.cpu(), return_inverse=True)
            each = torch.zeros(int(places.max()) + 1, 3, dtype=torch.float64).index_add_(0, places, each)
        if self._confusion is not None:
            self._places.append(torch.stack([places + self._rows, labels.cpu(), predicted.cpu()]))
        self._each.append(each)
        self._n += len(labels)
        self._rows += len(each)
        self._sums += each.sum(0)
        self._products += each.T @ each
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
        _, right, total = self._sums.tolist()
        require_scores(self._n, total)
        accuracy, loss, error = right / self._n, total / self._n, self._error(2)
        macro, spread = self._macro_f1()
        return Scores(
            n=self._n,
            accuracy=accuracy,
            macro_f1=macro,
            loss=loss,
            accuracy_interval=(
                of_share(accuracy, self._n)
                if self._rows == self._n
                else of_bounded(accuracy, self._error(1), self._rows)
            ),
            macro_f1_interval=None if macro is None else of_bounded(macro, spread, self._n),
            loss_interval=None if error is None else of_mean(loss, error),
        )

    def outcomes(self) -> Outcomes:
        """See `molehill.tasks.task.Tally`; of rows of several predictions the sums."""
        n, right, losses = torch.cat(self._each).T.numpy()
        parts = {self._accuracy.name: Parts.of_rows(right, n), LOSS.name: Parts.of_rows(losses, n)}
        if self._confusion is not None:
            rows, there, said = torch.cat(self._places, 1).numpy()
            # Half of a prediction is of the class that is there, half of the one that is said.
            halves = np.full(2 * len(rows), 0.5)
            hits = np.tile((there == said) / 2, 2)
            parts[MACRO_F1.name] = Parts(hits, halves, np.tile(rows, 2), np.concatenate([there, said]))
        return Outcomes(self._rows, parts)

    @property
    def confusion(self) -> list[list[int]] | None:
        """How many rows of each class (row) were taken for each (column); None for causal LM."""
        return None if self._confusion is None else self._confusion.tolist()

    def _error(self, what: int) -> float | None:
        """Standard error of a mean over predictions, whose rows are independent; None of a single row."""
        if self._rows < 2:
            return None
        mean = float(self._sums[what]) / self._n
        square = self._products[what, what] - 2 * mean * self._products[what, 0] + mean**2 * self._products[0, 0]
        return math.sqrt(max(0.0, float(square)) * self._rows / (self._rows - 1)) / self._n

    def _macro_f1(self) -> tuple[float | None, float | None]:
        """Macro-F1 and its standard error, by how much it changes with each row (the delta method)."""
        if self._confusion is None:
            return None, None
        counts = self._confusion.double()
        both = counts.sum(0) + counts.sum(1)  # 2 tp + fp + fn per class
        occurs = both > 0
        weight = torch.where(occurs, 1 / both.clamp_min(1), 0.0)
        f1 = 2 * counts.diag() * weight
        # A row of class i that is taken for j adds to the totals of both, and to what is right where they are one.
        change = torch.diag(2 * weight) - (f1 * weight)[:, None] - (f1 * weight)[None]
        error = float((counts * change**2).sum().sqrt() / occurs.sum())
        return float(f1[occurs].mean()), error
