"""Regression: a text, or a pair of texts, in; a number out, learnt as a part of its range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehill.intervals import Interval, of_correlation, of_mean
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_number
from molehill.plan import Figure, Scores
from molehill.tasks.measures import LOSS
from molehill.tasks.metrics import require_scores
from molehill.tasks.of_texts import OfTexts
from molehill.tasks.outcomes import Outcomes, Parts
from molehill.tasks.rows import Rows

Array = NDArray[np.float64]


class Regression(OfTexts):
    """Texts with a number each; implements `molehill.tasks.task.Task`.

    Learnt is where the number lies between the ends of its range, from -1 to 1.

    Args:
        tokenizer: Of the base model, with a padding token.
        range: Least and greatest number.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end.
    """

    outputs = 1
    likelihood = staticmethod(of_number)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, range: tuple[float, float], max_length: int) -> None:  # noqa: A002  (as the key is called)
        super().__init__(tokenizer, max_length)
        low, high = range
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def labels_of(self, rows: Rows) -> Sequence[float]:
        """Where each number lies in the range."""
        return [(value - self._middle) / self._half for value in rows["label"]]

    def tally(self) -> NumberSum:
        """Root mean squared and mean absolute error in the numbers' own unit, and correlations."""
        return NumberSum(self._half)


class NumberSum:
    """Numbers that were predicted, with the right ones; the order of the batches does not matter.

    Args:
        unit: What 1 of them is in the unit of the labels.
    """

    confusion = None
    found = None

    def __init__(self, unit: float) -> None:
        self._unit = unit
        self._said: list[Tensor] = []
        self._right: list[Tensor] = []
        self._loss = 0.0

    @torch.no_grad()
    def add(self, forward: Forward) -> None:
        """Count one batch."""
        self._said.append(forward.logits.squeeze(-1).double().cpu())
        self._right.append(forward.labels.double().cpu())
        self._loss += float(forward.nll().double().sum())

    def scores(self) -> Scores:
        """Errors, correlations and loss.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        said, right = (torch.cat(parts).numpy() if parts else np.zeros(0) for parts in (self._said, self._right))
        n = len(said)
        require_scores(n, self._loss)
        # In an order of their own, so that sums do not depend on that of the batches.
        order = np.lexsort((right, said))
        said, right = said[order], right[order]
        errors = (said - right) * self._unit
        square, within = _mean(errors**2)
        mae, within_mae = _mean(np.abs(errors))
        figures = {
            "rmse": Figure(
                value=math.sqrt(square),
                interval=None if within is None else (math.sqrt(within[0]), math.sqrt(within[1])),
            ),
            "mae": Figure(value=mae, interval=within_mae),
        }
        for name, (ours, theirs), spread in (
            ("pearson", (said, right), 0.0),
            ("spearman", (ranks(said), ranks(right)), 0.5),
        ):
            r = correlation(ours, theirs)
            if r is not None:
                figures[name] = Figure(value=r, interval=of_correlation(r, n, spread))
        loss, within_loss = _mean((errors / self._unit) ** 2 / 2)
        return Scores(n=n, loss=loss, loss_interval=within_loss, figures=figures)

    def outcomes(self) -> Outcomes:
        """See `molehill.tasks.task.Tally`."""
        errors = (torch.cat(self._said) - torch.cat(self._right)).numpy()
        parts = {
            "rmse": Parts.of_rows((errors * self._unit) ** 2, root=True),
            "mae": Parts.of_rows(np.abs(errors * self._unit)),
            LOSS.name: Parts.of_rows(errors**2 / 2),
        }
        return Outcomes(len(errors), parts)


def _mean(values: Array) -> tuple[float, Interval | None]:
    """A mean of values above 0, and its interval; none of a single value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None
    return mean, of_mean(mean, float(values.std(ddof=1)) / math.sqrt(len(values)))


def correlation(a: Array, b: Array) -> float | None:
    """Pearson's correlation; None where one of both is the same everywhere."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return min(1.0, max(-1.0, float(a @ b) / size)) if size > 0 else None


def ranks(values: Array) -> Array:
    """Ranks from 0, those of equal values their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts - 1) / 2)[places]
