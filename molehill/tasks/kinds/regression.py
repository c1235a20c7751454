"""Regression: a text, or a pair of texts, in; a number out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from molehill import config
from molehill.errors import DataError
from molehill.registry import register
from molehill.rowfiles.values import number_of
from molehill.tasks.kind import Kind
from molehill.tasks.measures import LOSS, figured
from molehill.tasks.rows import Rows
from molehill.tasks.texts import texts
from molehill.words import amount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task

_STRATA = 5


@register("task", "regression", paper="house: squared error of a number that a pooled text gives")
class Regression(Kind):
    """A text, or a pair of texts, has a number: ``text, [text_pair,] label``, such as how alike two sentences are."""

    columns = ("text", "text_pair", "label")
    required = ("text", "label")
    predicts = "number"
    bundle = "regression"
    pipeline = "text-classification"  # as the hub has it
    measures = (
        figured("rmse", "root mean squared error", "RMSE", lower=True, most=None, write=amount),
        figured("pearson", "Pearson r", "r", least=-1.0),
        figured("spearman", "Spearman rho", "rho", least=-1.0, tabled=False),
        figured("mae", "mean absolute error", "MAE", lower=True, most=None, write=amount, tabled=False),
        LOSS,
    )

    def settle(self, rows: Rows, task: config.Task) -> config.Task:
        """Take the least and the greatest number of the rows, where the configuration gives no range.

        Raises:
            DataError: A label is no number, or all are the same.
        """
        if task.range is not None:
            return task
        found = [number_of(value, where) for value, where in zip(rows["label"], rows.where, strict=True)]
        if min(found) == max(found):
            what = f"every row has the number {found[0]:g}"
            raise DataError(what, where=rows.source, mend="Give rows of several, or set task.range.")
        return task.model_copy(update={"range": (min(found), max(found))})

    def missing(self, task: config.Task) -> str:
        """The range, where it is not given."""
        return "" if task.range else "range"

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check the texts, and bring the labels to numbers.

        Raises:
            DataError: A text or number is missing or of another type, or a number is not within the range.
        """
        del named
        assert task.range is not None  # settled
        low, high = task.range
        found = [number_of(value, where) for value, where in zip(rows["label"], rows.where, strict=True)]
        for value, where in zip(found, rows.where, strict=True):
            if not low <= value <= high:
                what = f"the label {value:g} is not within task.range, {low:g} to {high:g}"
                raise DataError(what, where=where, mend="Mend the row, or widen task.range.")
        return texts(rows).having(label=found)

    def strata(self, rows: Rows) -> Sequence[str]:
        """Fifths of the rows, by their numbers."""
        values = np.array(rows["label"])
        edges = np.quantile(values, np.arange(1, _STRATA) / _STRATA)
        return [str(int(place)) for place in np.searchsorted(edges, values)]

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors."""
        from molehill.tasks.regression import Regression as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.range or (-1.0, 1.0), task.max_length)
