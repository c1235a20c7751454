"""Checks rows against the task and brings them to one form.

Which columns a task reads, and what they may hold, its kind says (see `molehill.tasks.kind`).
``group`` (rows that must stay together), ``task`` and ``domain`` (for methods that route by them) are read only from
the columns that ``data.columns`` names for them: a column that merely bears the name may mean anything.
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from molehill import config
from molehill.characters import bare
from molehill.errors import DataError
from molehill.rowfiles.messages import Message, messages_of
from molehill.tasks.kind import kind_of
from molehill.tasks.labels import in_order
from molehill.tasks.rows import DOMAIN, GROUP, STRATUM, TASK, Rows
from molehill.tasks.sources import read_rows
from molehill.words import counted

_log = logging.getLogger(__name__)

_TEXTS = ("text", "text_pair", "tokens", "prompt", "instruction", "input")  # what is asked, and no answer
_OURS = ("group", "task", "domain")
_TALKS = ("messages", "conversations")


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
    kind, read = kind_of(task), read_rows(data.source, split=data.split)
    kind.require_read(read, [*data.columns.values(), *map(str, data.partition.params.values())])
    if only is not None:
        ours = {data.columns.get(name, name) for name in kind.columns}
        if withheld := [repr(name) for name in read.columns if name in ours and name not in only]:
            _log.warning("%s: columns that may not be read are left out: %s", data.source, ", ".join(withheld))
        read = read.only({*only, GROUP})  # ours: it says what stays together, and is neither learnt nor told
    rows = read.renamed({ours: theirs for ours, theirs in data.columns.items() if ours not in _OURS})
    if "group" in data.columns:
        rows = rows.having(**{GROUP: read[data.columns["group"]]})
    if "task" in data.columns:
        rows = rows.having(**{TASK: _task_ids(read, data.columns["task"])})
    if "domain" in data.columns:
        rows = rows.having(**{DOMAIN: _domain_ids(read, data.columns["domain"], data.domains)})
    task = kind.settle(rows, task)
    rows = kind.conform(rows, task, data.columns)
    rows = replace(rows, read=tuple(kind.reads(rows.columns)))
    strata = kind.strata(rows)
    return rows if strata is None else rows.having(**{STRATUM: strata}), task


def columns_of(data: config.Data, task: config.Task, there: Collection[str] = ()) -> set[str]:
    """Columns of a source that a run reads, by the source's own names.

    Args:
        data: Names columns.
        task: Has columns of its own.
        there: Columns of rows that were read, for those that count only where they are; without them, those that the
            run cannot do without, or names.
    """
    ours = kind_of(task).reads(there)
    return {*data.columns.values(), *(data.columns.get(name, name) for name in ours)}


def class_counts(rows: Rows, task: config.Task) -> Mapping[str, int]:
    """Rows of every class in the order of the logits; empty where there are no classes.

    Args:
        rows: Checked rows.
        task: With its labels known.
    """
    return kind_of(task).counts(rows, task.labels)


def content_keys(rows: Rows) -> list[str]:
    """What a model would see of each row, without what it is to answer: rows with equal keys are twins.

    Case, punctuation, white space and Unicode form make no difference, in none of a row's strings
    (see `molehill.characters.bare`); the words of a list are one text. Of a conversation the last answer is left out.

    Args:
        rows: Checked rows.
    """
    there = rows.read or rows.columns
    parts = []
    for name in (name for name in (*_TEXTS, *_TALKS) if name in there and name in rows.columns):
        values: Iterable[Any] = rows[name]
        if name in _TALKS:
            values = (_asked(value, name, where) for value, where in zip(values, rows.where, strict=True))
        parts.append([_bare(value) for value in values])
    return [json.dumps([part[i] for part in parts], sort_keys=True, default=str) for i in range(len(rows))]


def _asked(value: Any, name: str, where: str) -> list[Message]:
    """A conversation up to its last answer, where somebody asks before it."""
    turns = [{key: item for key, item in turn.items() if key != "weight"} for turn in messages_of(value, name, where)]
    asked = list(turns)
    for answers in (False, True):
        while asked and (asked[-1]["role"] == "assistant") is answers:
            asked.pop()
    return asked if any(turn["role"] == "user" for turn in asked) else turns


def _bare(value: Any) -> Any:
    if isinstance(value, str):
        return bare(value)
    if isinstance(value, Mapping):
        return {name: _bare(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if all(isinstance(item, str) for item in value):
            return bare(" ".join(value))
        return [_bare(item) for item in value]
    return value


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
    ids = {name: number for number, name in enumerate(in_order({str(value) for value in values}))}
    return [ids[str(value)] for value in values]


def _domain_ids(rows: Rows, column: str, domains: Sequence[str] | Sequence[float]) -> list[int]:
    """The domain of every row: the place of its name, or the bin of its number; -1 where it has none."""
    values, bins = rows[column], [edge for edge in domains if not isinstance(edge, str)]
    found = []
    for value, where in zip(values, rows.where, strict=True):
        if value is None or value == "":
            found.append(-1)
        elif bins:
            found.append(bisect_left(bins, _number(value, column, where)))
        else:
            found.append(domains.index(str(value)) if str(value) in domains else -1)
    if none := found.count(-1):
        known = "no number" if bins else f"none of data.domains ({', '.join(map(str, domains))})"
        _log.warning("%s: in %s, column %r has %s", rows.source, counted(none, "row"), column, known)
    return found


def _number(value: Any, column: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        what = f"{column!r} must be a number to be in a bin of data.domains, but is {value!r:.40}"
        raise DataError(what, where=where, mend="Fill it in, or leave it empty where there is none.")
    return number
