"""Rows as JSON: one object a line, or one array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from molehill.errors import DataError
from molehill.rowfiles.values import Record, require_text

_DIGITS = 4000  # of a whole number; above 4300 Python refuses to print it
_DEEPEST = 200  # levels of nested lists and objects; Python's own parser ends at less than 1000
_ONE_A_LINE = "Write one JSON object per line, or one array of objects."
_BLANK = re.compile(r"[ \t\r\n]*")


def rows(text: str, source: str) -> Iterator[Record]:
    """Yield the rows of a file with one object a line, or with one array of objects.

    Args:
        text: Of the file.
        source: Its name.

    Raises:
        DataError: Something in it is no JSON, or no object.
    """
    if text.lstrip()[:1] == "[":
        yield from _array(text, source)
        return
    # Only \n ends a JSON line; str.splitlines would also cut at U+2028 inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            value, end = _value(line, _skip(line, 0), where)
        except DataError as error:
            raise _whole(text, source) or error from None
        if line[end:].strip():
            raise DataError("not JSON: there is more after the object", where=where, mend=_ONE_A_LINE)
        yield where, _object(value, where)


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        _DECODER.decode(text)
    except (ValueError, _TwiceError, RecursionError):
        return False
    return True


def _array(text: str, source: str) -> Iterator[Record]:
    """Rows of one array; several of one line are told apart by their number."""
    one_line = "\n" not in text.strip()
    at, line, number = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1, 0
    while True:
        begin = _skip(text, at)
        line += text.count("\n", at, begin)
        where = f"{source}:{line}" + (f" (row {number + 1})" if one_line else "")
        if text[begin : begin + 1] == "]" and (number == 0 or text[at - 1] != ","):
            break
        value, at = _value(text, begin, where)
        yield where, _object(value, where)
        line += text.count("\n", begin, at)
        number += 1
        after = _skip(text, at)
        line += text.count("\n", at, after)
        at = after + 1
        if text[after : after + 1] not in {",", "]"}:
            what = "not JSON: the array is cut off" if after == len(text) else "not JSON: no comma between two rows"
            raise DataError(what, where=f"{source}:{line}", mend="Write the file anew.")
        if text[after] == "]":
            begin = after
            break
    if text[begin + 1 :].strip():
        raise DataError("not JSON: there is more after the array", where=f"{source}:{line}", mend=_ONE_A_LINE)


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _value(text: str, at: int, where: str) -> tuple[Any, int]:
    """The JSON value at a place of a text, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        said = "it ends too early" if error.pos >= len(text.rstrip()) else error.msg
        raise DataError(f"not JSON: {said}", where=where, mend=_ONE_A_LINE) from None
    except _TwiceError as error:
        raise DataError(f"the key {error} is there twice", where=where, mend="Remove one of them.") from None
    except RecursionError:
        what = f"lists and objects are nested more than {_DEEPEST} deep"
        raise DataError(what, where=where, mend="Remove that column.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, mend=_ONE_A_LINE)
    if _depth_exceeds(value, _DEEPEST):
        what = f"lists and objects are nested more than {_DEEPEST} deep"
        raise DataError(what, where=where, mend="Remove that column.")
    for column, item in value.items():
        require_text(column, column, where)
        require_text(item, column, where)
    return value


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _whole(text: str, source: str) -> DataError | None:
    """What is wrong when the lines are no JSON, but the file as a whole is: one object over several lines."""
    begin = _skip(text, 0)
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, _TwiceError, RecursionError):
        return None
    if not isinstance(value, dict) or "\n" not in text[begin:end]:
        return None
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if lists and not text[end:].strip():
        what, mend = f"one JSON object; its rows seem to be in {lists[0]!r}", f"Write that list: jq -c '.{lists[0]}[]'"
    else:
        what, mend = "a JSON object over several lines", "Write one object per line: jq -c ."
    return DataError(what, where=source, mend=mend)


class _TwiceError(Exception):
    """A key of an object that is there twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _integer(digits: str) -> int | str:
    """A whole number; one of thousands of digits stays text, since Python would not print it."""
    return int(digits) if len(digits) <= _DIGITS else digits


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer)
