"""Checks rows against the task and brings them to one form.

Schemas: ``text, label`` for classification; for causal LM see `molehill.rowfiles.readings`.
``group`` (rows that must stay together) and ``task`` (for methods that route by task) are read only from the columns
that ``data.columns`` names for them: a column that merely bears the name may mean anything.
"""

from __future__ import annotations

import difflib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping

from molehill import config
from molehill.characters import alike
from molehill.errors import DataError
from molehill.rowfiles import readings
from molehill.rowfiles.values import label_of, text_of
from molehill.tasks import conversations
from molehill.tasks.rows import GROUP, TASK, Rows
from molehill.tasks.sources import read_rows
from molehill.words import counted

_log = logging.getLogger(__name__)

# Columns of a task, by the names that Molehill uses.
COLUMNS = {"classification": ("text", "label"), "causal-lm": readings.COLUMNS}

_NOTHING = {
    *("nan", "na", "n/a", "#n/a", "<na>", "nat", "nil", "none", "null", "undefined", "-", "--", "?", ".", "#value!"),
    *("#ref!", "#div/0!", "#name?"),
}  # as `alike` writes them


def load_rows(data: config.Data, task: config.Task, *, only: Collection[str] | None = None) -> tuple[Rows, config.Task]:
    """Read and check the rows of a run.

    Args:
        data: Where the rows are.
        task: What they must hold; empty ``labels`` are derived from all rows.
        only: Columns of the source that may be read, by its own names; None for all.

    Returns:
        The rows in one form, and the task with its labels.

    Raises:
        DataError: The source cannot be read, or a row does not fit; names file and line.
    """
    read = read_rows(data.source, split=data.split)
    if task.kind == "causal-lm":
        conversations.require_read(read, {*data.columns.values(), *map(str, data.partition.params.values())})
    if only is not None:
        ours = {data.columns.get(name, name) for name in COLUMNS[task.kind]}
        if withheld := [repr(name) for name in read.columns if name in ours and name not in only]:
            _log.warning("%s: columns that may not be read are left out: %s", data.source, ", ".join(withheld))
        read = read.only(only)
    rows = read.renamed({ours: theirs for ours, theirs in data.columns.items() if ours not in ("group", "task")})
    if "group" in data.columns:
        rows = rows.having(**{GROUP: read[data.columns["group"]]})
    if "task" in data.columns:
        rows = rows.having(**{TASK: _task_ids(read, data.columns["task"])})
    if task.kind == "causal-lm":
        return conversations.conform(rows, data.columns), task
    if not task.labels:
        task = task.model_copy(update={"labels": derive_labels(rows)})
    return conform(rows, task), task


def columns_of(data: config.Data, task: config.Task, there: Collection[str] = ()) -> set[str]:
    """Columns of a source that a run reads, by the source's own names.

    Args:
        data: Names columns.
        task: Has columns of its own.
        there: Columns of rows that were read, for those that count only where they are; without them, those that the
            run cannot do without, or names.
    """
    ours = COLUMNS["classification"] if task.kind == "classification" else conversations.columns_read(there)
    return {*data.columns.values(), *(data.columns.get(name, name) for name in ours)}


def conform(rows: Rows, task: config.Task) -> Rows:
    """Check every row and bring its columns to one form: strings stripped of nothing, labels as strings.

    Args:
        rows: Rows with the schema's column names.
        task: The kind, and for classification the labels allowed.

    Raises:
        DataError: A column or value is missing, has the wrong type, is empty, or is a label not in the list.
    """
    if task.kind == "classification":
        labels = [label_of(value, where) for value, where in zip(rows["label"], rows.where, strict=True)]
        for label, where in zip(labels, rows.where, strict=True):
            if label not in task.labels:
                raise _unknown_label(label, task.labels, where)
        return rows.having(text=_strings(rows, "text"), label=labels)
    return conversations.conform(rows)


def derive_labels(rows: Rows) -> tuple[str, ...]:
    """Labels that occur, sorted: by value when all are whole numbers, else as text.

    Raises:
        DataError: The column is missing, a label has the wrong type or is a word for nothing, two are nearly equal,
            some are truth and others not, or there are fewer than two.
    """
    truth = [isinstance(value, bool) for value in rows["label"]]
    if any(truth) and not all(truth):
        what = "this label is true or false and those of other rows are not"
        raise DataError(what, where=rows.where[truth.index(True)], mend="Write all labels alike, or list task.labels.")
    found: dict[str, list[str]] = {}  # places, by label
    for value, where in zip(rows["label"], rows.where, strict=True):
        found.setdefault(label_of(value, where), []).append(where)
    if len(found) < 2:
        only = next(iter(found))
        raise DataError(f"every row has the label {only!r}", where=rows.source, mend="Give rows of two classes.")
    _require_apart(found)
    return _in_order(set(found))


def class_counts(rows: Rows, task: config.Task) -> dict[str, int]:
    """Rows of every class in the order of the logits; empty for causal LM.

    Args:
        rows: Checked rows.
        task: With its labels known.
    """
    counts = Counter(rows["label"]) if task.kind == "classification" else Counter[str]()
    return {label: counts[label] for label in task.labels}


def _require_apart(found: Mapping[str, list[str]]) -> None:
    """Refuse classes that are one to people, and words for nothing: each would get a row of the head by accident."""
    same: dict[str, str] = {}
    for label in sorted(found, key=lambda label: (-len(found[label]), label)):
        first = found[label][0]
        if alike(label) in _NOTHING:
            what = f"the label {label!r} of {counted(len(found[label]), 'row')} is a word for nothing"
            raise DataError(what, where=first, mend="Remove these rows, or list it with all classes in task.labels.")
        known = same.setdefault(alike(label), label)
        if known != label:
            look = ascii if unicodedata.normalize("NFC", known) == unicodedata.normalize("NFC", label) else repr
            more, fewer = (counted(len(found[each]), "row") for each in (known, label))
            what = f"the labels {look(known)} ({more}) and {look(label)} ({fewer}, the first here) are nearly equal"
            mend = "Write them alike, or list both with all classes in task.labels."
            raise DataError(what, where=first, mend=mend)


def content_keys(rows: Rows) -> list[str]:
    """What a model would see of each row, without answers: rows with equal keys are duplicates."""
    asked = ("text", "messages", "conversations", "prompt", "instruction", "input")
    names = [name for name in asked if name in rows.columns]
    columns = [rows[name] for name in names]
    return [json.dumps([values[i] for values in columns], sort_keys=True, default=str) for i in range(len(rows))]


def _strings(rows: Rows, name: str) -> list[str]:
    return [text_of(value, name, where) for value, where in zip(rows[name], rows.where, strict=True)]


def _unknown_label(label: str, labels: tuple[str, ...], where: str) -> DataError:
    folded = {known.casefold(): known for known in labels}
    near = difflib.get_close_matches(label.casefold().strip(), folded, n=1)
    hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
    what = f"label {label!r:.60} is not in task.labels ({', '.join(labels)})"
    return DataError(what, where=where, mend=f"{hint}Mend the row, or add the label to task.labels.")


def _task_ids(rows: Rows, column: str) -> list[int]:
    """The task of every row: whole numbers as they are, names (and all cells of a CSV file) as their place in order."""
    values = rows[column]
    for value, where in zip(values, rows.where, strict=True):
        named = isinstance(value, str) and value.strip()
        if not named and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            what = f"{column!r} must be a name or a whole number from 0 to be the task, but is {value!r:.40}"
            raise DataError(what, where=where, mend="Fill it in, or leave task out of data.columns.")
    if not any(isinstance(value, str) for value in values):
        return list(values)
    ids = {name: number for number, name in enumerate(_in_order({str(value) for value in values}))}
    return [ids[str(value)] for value in values]


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted: by value when all are whole numbers, else as text."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))
