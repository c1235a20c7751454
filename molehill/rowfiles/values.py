"""What a row may hold: texts, and labels as they are named everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molehill.characters import flaw
from molehill.errors import DataError

Record = tuple[str, dict[str, Any]]  # place, values by column


def require_text(value: Any, column: str, where: str) -> None:
    """Refuse strings that are no Unicode text, however deep they lie.

    Args:
        value: Of a row.
        column: Its column.
        where: Place of the row.

    Raises:
        DataError: Names the column, and what is wrong.
    """
    if isinstance(value, str):
        wrong = flaw(value)
        if wrong:
            raise DataError(f"{column!r} {wrong}", where=where, mend="Write the text anew, or remove the row.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            require_text(key, column, where)
            require_text(item, column, where)
    elif isinstance(value, list):
        for item in value:
            require_text(item, column, where)


def label_of(value: Any, where: str) -> str:
    """A class as it is named everywhere: text as it is, whole numbers in digits, truth as ``true`` and ``false``.

    Args:
        value: Of a row.
        where: Place of the row.

    Raises:
        DataError: It is neither, or nothing.
    """
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else text_of(value, "label", where)


def text_of(value: Any, name: str, where: str) -> str:
    """A value that must be a text which is not empty.

    Args:
        value: Of a row.
        name: Of its column.
        where: Place of the row.

    Raises:
        DataError: It is no text, or an empty one.
    """
    if value is None:
        raise DataError(f"the row has no {name!r}", where=where, mend="Fill it in, or remove the row.")
    if not isinstance(value, str):
        what = f"{name!r} must be text, but is {type(value).__name__} {value!r:.40}"
        raise DataError(what, where=where, mend="Write it as a string.")
    if not value.strip():
        raise DataError(f"{name!r} is empty", where=where, mend="Fill it in, or remove the row.")
    return value
