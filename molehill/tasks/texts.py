"""Texts of rows, alone or in pairs, for the tasks that read them."""

from __future__ import annotations

from molehill.errors import DataError
from molehill.rowfiles.pairs import PAIR, TEXT
from molehill.rowfiles.values import text_of
from molehill.tasks.rows import Rows


def strings(rows: Rows, name: str) -> list[str]:
    """A column of texts that are not empty.

    Raises:
        DataError: The column or a text is missing, or a value is no text.
    """
    return [text_of(value, name, where) for value, where in zip(rows[name], rows.where, strict=True)]


def texts(rows: Rows) -> Rows:
    """Rows with their texts checked: ``text``, and ``text_pair`` where there is one.

    Raises:
        DataError: A text is missing, empty or no text; of a second text all rows have one, or none.
    """
    checked = rows.having(**{TEXT: strings(rows, TEXT)})
    if PAIR not in rows.columns:
        return checked
    there = [value is not None and value != "" for value in rows[PAIR]]
    if not any(there):
        return checked.only([name for name in checked.columns if name != PAIR])
    if not all(there):
        raise DataError(
            f"the row has no {PAIR!r}, and others have one", where=rows.where[there.index(False)],
            mend="Fill it in, or give no row a second text.",
        )  # fmt: skip
    return checked.having(**{PAIR: strings(rows, PAIR)})
