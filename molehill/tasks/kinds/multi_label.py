"""Multi-label classification: a text, or a pair of texts, in; any number of labels out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from molehill import config
from molehill.errors import DataError
from molehill.registry import register
from molehill.rowfiles.values import BETWEEN, names_of
from molehill.tasks import labels
from molehill.tasks.kind import Kind
from molehill.tasks.measures import LOSS, MACRO_F1, figured
from molehill.tasks.rows import Rows
from molehill.tasks.texts import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task

LABELS = "labels"


@register("task", "multi-label", paper="house: one sigmoid for every label of a pooled text")
class MultiLabel(Kind):
    """A text, or a pair of texts, has any number of labels, or none: ``text, [text_pair,] labels``."""

    columns = ("text", "text_pair", LABELS)
    required = ("text", LABELS)
    predicts = "flags"
    labelled = True
    bundle = "multi-label"
    pipeline = "text-classification"  # as the hub has it
    measures = (
        figured("micro_f1", "micro-F1", "F1"),
        MACRO_F1,
        figured("subset_accuracy", "rows whose labels are all right", "all right", tabled=False),
        LOSS,
    )
    stages = f"Micro-F1 is that of all labels of all rows together. {Kind.stages}"

    def settle(self, rows: Rows, task: config.Task) -> config.Task:
        """Take the labels that occur, where the configuration lists none.

        Raises:
            DataError: They make no list of labels, or one looks like several.
        """
        if task.labels:
            return task
        there = [(name, at) for some, at in zip(rows[LABELS], rows.where, strict=True) for name in names_of(some, at)]
        for name, where in there:
            mark = next((mark for mark in (";", ",", BETWEEN) if mark in name), "")
            if mark:
                what = f"the label {name!r:.60} looks like several"
                mend = f"Write a list, or {BETWEEN} between the names of a cell; or name it in task.labels."
                raise DataError(what, where=where, mend=mend)
        if len({name for name, _ in there}) < 2:
            what = f"all labels are {there[0][0]!r}" if there else "no row has a label"
            raise DataError(what, where=rows.source, mend="Give rows of two labels.")
        return task.model_copy(update={"labels": labels.derive(there, rows.source)})

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check the texts, and bring the labels of every row to a list of texts, in the order of ``task.labels``.

        Raises:
            DataError: A text is missing or no text, a row has no list of labels, or one of them is none that there is.
        """
        del named
        found = []
        for some, where in zip(rows[LABELS], rows.where, strict=True):
            there = {labels.known(name, task.labels, where) for name in names_of(some, where)}
            found.append([name for name in task.labels if name in there])
        return texts(rows).having(**{LABELS: found})

    def counts(self, rows: Rows, labels: Sequence[str]) -> Mapping[str, int]:
        """Rows that have each label, in the order of the logits."""
        found = Counter(name for some in rows[LABELS] for name in some)
        return {label: found[label] for label in labels}

    def strata(self, rows: Rows) -> Sequence[str]:
        """The rarest label of every row, so that those which few rows have are held out as well."""
        often = Counter(name for some in rows[LABELS] for name in some)
        return [min(some, key=lambda name: (often[name], name), default="") for some in rows[LABELS]]

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors."""
        from molehill.tasks.multi_label import MultiLabel as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.labels, task.max_length)
