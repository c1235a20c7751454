"""Sequence classification: a text, or a pair of texts, in; one of a list of classes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from molehill import config
from molehill.registry import register
from molehill.tasks import labels
from molehill.tasks.kind import Kind
from molehill.tasks.measures import ACCURACY, LOSS, MACRO_F1
from molehill.tasks.rows import Rows
from molehill.tasks.texts import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task


@register("task", "classification", paper="house: softmax over the classes of a pooled text")
class Classification(Kind):
    """A text, or a pair of texts, has one of several classes: ``text, [text_pair,] label``."""

    columns = ("text", "text_pair", "label")
    required = ("text", "label")
    labelled = True
    bundle = "classification"
    pipeline = "text-classification"
    measures = (ACCURACY, MACRO_F1, LOSS)

    def settle(self, rows: Rows, task: config.Task) -> config.Task:
        """Take the classes that occur, where the configuration lists none.

        Raises:
            DataError: They make no list of classes.
        """
        if task.labels:
            return task
        found = labels.derive(zip(rows["label"], rows.where, strict=True), rows.source)
        return task.model_copy(update={"labels": found})

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check the texts, and bring the labels to texts.

        Raises:
            DataError: A text or label is missing or no text, or a label is none of the classes.
        """
        del named
        found = [
            labels.known(value, task.labels, where) for value, where in zip(rows["label"], rows.where, strict=True)
        ]
        return texts(rows).having(label=found)

    def counts(self, rows: Rows, labels: Sequence[str]) -> Mapping[str, int]:
        """Rows of every class in the order of the logits."""
        found = Counter(rows["label"])
        return {label: found[label] for label in labels}

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors."""
        from molehill.tasks.classification import Classification as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.labels, task.max_length)
