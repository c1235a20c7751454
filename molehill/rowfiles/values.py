"""What a row may hold: texts, and labels as they are named everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from molehill.characters import flaw
from molehill.errors import DataError

Record = tuple[str, dict[str, Any]]  # place, values by column
BETWEEN = "|"  # names of one cell of a table


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


def number_of(value: Any, where: str) -> float:
    """A label as a number; tables of text write it in digits.

    Args:
        value: Of a row.
        where: Place of the row.

    Raises:
        DataError: It is no number, or nothing.
    """
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        what = "the row has no 'label'" if value is None or value == "" else f"the label {value!r:.40} is no number"
        raise DataError(what, where=where, mend="Write a number such as 3.5, or remove the row.")
    return found


def names_of(value: Any, where: str) -> tuple[str, ...]:
    """Labels of which a row has any number, as they are named everywhere.

    Args:
        value: A list; or, as tables of text have it, a JSON list or names with ``|`` between them. None of them is an
            empty list, or an empty text.
        where: Place of the row.

    Raises:
        DataError: It is neither, a name is there twice, or a name is none.
    """
    mend = 'Write a list such as ["a", "b"], in a table a|b, or [] for none.'
    if value is None:
        raise DataError("the row has no 'labels'", where=where, mend=mend)
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(BETWEEN)]
        except ValueError:
            raise DataError(f"the labels {text!r:.40} are no JSON list", where=where, mend=mend) from None
        value = value if text else []
    if not isinstance(value, list | tuple):
        what = f"'labels' must be a list, but is {type(value).__name__} {value!r:.40}"
        raise DataError(what, where=where, mend=mend)
    found = tuple(label_of(each, where) for each in value)
    twice = [name for place, name in enumerate(found) if name in found[:place]]
    if twice:
        raise DataError(f"the label {twice[0]!r} is there twice", where=where, mend="Name it once.")
    return found


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
