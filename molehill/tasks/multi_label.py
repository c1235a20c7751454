"""Multi-label classification: a text, or a pair of texts, in; for every label whether it is there out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from molehill.intervals import of_bounded, of_mean, of_share, standard_error
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_flags
from molehill.plan import Figure, Scores
from molehill.tasks.measures import LOSS, MACRO_F1
from molehill.tasks.metrics import require_scores
from molehill.tasks.of_texts import OfTexts
from molehill.tasks.outcomes import Outcomes, Parts
from molehill.tasks.rows import Rows


class MultiLabel(OfTexts):
    """Texts with any number of labels each; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model, with a padding token.
        labels: Names of the labels in the order of the logits.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end.
    """

    likelihood = staticmethod(of_flags)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.labels = tuple(labels)
        self.outputs = len(self.labels)

    def labels_of(self, rows: Rows) -> list[tuple[float, ...]]:
        """For each row 1 for every label that it has, and 0 for the others."""
        return [tuple(float(label in some) for label in self.labels) for some in map(set, rows["labels"])]

    def tally(self) -> FlagSum:
        """Micro- and macro-F1, rows whose labels are all right, and cross-entropy."""
        return FlagSum(self.outputs)


class FlagSum:
    """Labels that were said and that are there; the order of the batches does not matter.

    A label is said where it is at least as likely there as not.

    Args:
        classes: How many labels there are.
    """

    found = None

    def __init__(self, classes: int) -> None:
        self._said = [np.zeros((0, classes), bool)]
        self._there = [np.zeros((0, classes), bool)]
        self._losses = [np.zeros(0)]

    @torch.no_grad()
    def add(self, forward: Forward) -> None:
        """Count one batch."""
        self._said.append((forward.logits >= 0).cpu().numpy())
        self._there.append((forward.labels > 0).cpu().numpy())
        self._losses.append(forward.nll().double().cpu().numpy())

    def scores(self) -> Scores:
        """F1 of all labels together, mean F1 over the labels that are there or said, rows all right, and loss.

        Where no label is there and none is said, F1 means nothing.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        said, there = (np.concatenate(parts) for parts in (self._said, self._there))
        losses = np.sort(np.concatenate(self._losses))  # so that the sum does not depend on the batches
        n = len(losses)
        require_scores(n, float(losses.sum()))
        loss, error = float(losses.mean()), standard_error(float(losses.sum()), float(losses @ losses), n)
        exact = float((said == there).all(1).mean())
        figures = {"subset_accuracy": Figure(value=exact, interval=of_share(exact, n))}
        hits, both = (said & there).astype(np.int64), said.astype(np.int64) + there
        if both.any():
            value, spread = _f1(hits.sum(1, keepdims=True), both.sum(1, keepdims=True))
            figures["micro_f1"] = Figure(value=value, interval=of_bounded(value, spread, n))
        occurs = both.any(0)
        macro, spread = _f1(hits[:, occurs], both[:, occurs]) if occurs.any() else (None, None)
        return Scores(
            n=n,
            macro_f1=macro,
            loss=loss,
            figures=figures,
            macro_f1_interval=None if macro is None else of_bounded(macro, spread, n),
            loss_interval=None if error is None else of_mean(loss, error),
        )

    def outcomes(self) -> Outcomes:
        """See `molehill.tasks.task.Tally`."""
        said, there = (np.concatenate(parts) for parts in (self._said, self._there))
        hits, both = (said & there).astype(np.float64), (said.astype(np.float64) + there) / 2
        rows, columns = np.nonzero(both)
        parts = {
            "subset_accuracy": Parts.of_rows((said == there).all(1)),
            LOSS.name: Parts.of_rows(np.concatenate(self._losses)),
        }
        if len(rows):
            parts["micro_f1"] = Parts.of_rows(hits.sum(1), both.sum(1))
            parts[MACRO_F1.name] = Parts(hits[rows, columns], both[rows, columns], rows, columns)
        return Outcomes(len(said), parts)

    @property
    def confusion(self) -> list[list[int]]:
        """How many rows that have each label are said to have it, and how many are not."""
        said, there = (np.concatenate(parts) for parts in (self._said, self._there))
        return np.stack([(said & there).sum(0), (~said & there).sum(0)], 1).tolist()  # type: ignore[no-any-return]  # numpy's lists are Any


def _f1(hits: NDArray[np.int64], both: NDArray[np.int64]) -> tuple[float, float | None]:
    """The mean of F1 over columns, and its standard error by how much it changes with each row (the delta method).

    Args:
        hits: 1 where a label is there and said, ``[N, C]``, or how many are.
        both: How many of a label are there and said, added up, of every row, ``[N, C]``; no column is 0.
    """
    totals = both.sum(0)
    f1 = 2 * hits.sum(0) / totals
    n = len(hits)
    if n < 2:
        return float(f1.mean()), None
    change = ((2 * hits - f1 * both) / totals).mean(1)
    return float(f1.mean()), math.sqrt(float(change @ change) * n / (n - 1))
