"""Rows of a causal language model: questions with answers, conversations or plain text, told by their columns."""

from __future__ import annotations

from collections.abc import Collection

from molehill.errors import DataError
from molehill.rowfiles.readings import TOOLS, form_of, others, reading_of, settled
from molehill.tasks.rows import Rows

# Columns that other programs read beside ours, and where what they hold belongs here.
_UNREAD = {
    "functions": "Describe them in a column 'tools'.",
    "history": "Write the whole conversation as 'messages'.",
    "system": "Make it the first of the messages, of the role 'system'.",
}


def require_read(rows: Rows, taken: Collection[str]) -> None:
    """Refuse columns that mean something in a conversation and that nothing reads.

    Args:
        rows: With the columns of their source.
        taken: Columns that the configuration names, which are read.

    Raises:
        DataError: One of them is filled in.
    """
    for name in (name for name in _UNREAD if name not in taken):
        for value, where in zip(rows.columns.get(name, ()), rows.where, strict=False):
            if value:
                mend = f"{_UNREAD[name]} If it means something else, remove the column."
                raise DataError(f"{name!r} is not read", where=where, mend=mend)


def conform(rows: Rows, named: Collection[str] = ()) -> Rows:
    """Check every row and fill in what may be missing: strings are stripped of nothing.

    Args:
        rows: Rows with the schema's column names.
        named: Columns that the configuration names, which decide where the columns have several meanings.

    Raises:
        DataError: A column or value is missing, has the wrong type or is empty, or the columns have several meanings.
    """
    reading = reading_of(rows.columns, named, rows.source)
    for name in reading.columns:
        _ = rows[name]  # or the error names the columns that are there
    rows = rows.only(rows.columns.keys() - others(rows.columns, reading))
    forms = [form_of(row, reading, where) for where, row in rows.records()]
    # Conversations in other forms stay as they are until they are encoded, so that a copy of the rows is their owner's.
    ours = {name for name in (*reading.columns, *reading.more) if name in forms[0]} - ({TOOLS} - rows.columns.keys())
    return rows.having(**{name: [form[name] for form in forms] for name in ours})


def columns_read(columns: Collection[str]) -> tuple[str, ...]:
    """Columns of checked rows that are read.

    Args:
        columns: Those that are there.
    """
    reading = settled(columns)
    return tuple(name for name in (*reading.columns, *reading.more) if name in columns)
