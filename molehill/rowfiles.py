"""Rows of text files: JSON lines, JSON arrays, CSV, TSV, plain lines, and all of them compressed by gzip.

The one reader of everything that takes rows: training, `molehill check`, a lab machine, and a device, which is why it
needs the standard library only (docs/adr/0006). Every row comes with its place, ``file:line``; whatever is no row is a
`DataError` with that place, and so is a string that is no Unicode.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from molehill.characters import flaw
from molehill.errors import DataError

Record = tuple[str, dict[str, Any]]  # place, values by column

STDIN = "-"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_GZIP = ".gz"
_DIGITS = 4000  # of a whole number; above 4300 Python refuses to print it
_DEEPEST = 200  # levels of nested lists and objects; Python's own parser ends at less than 1000
_ONE_A_LINE = "Write one JSON object per line, or one array of objects."
_GZIPPED = b"\x1f\x8b"
_OTHERS = {b"PAR1": "Parquet", b"PK\x03\x04": "spreadsheet or zip", b"ARRO": "Arrow"}  # by their first bytes
_BLANK = re.compile(r"[ \t\r\n]*")


def suffix(path: Path) -> str:
    """The suffix that says what a file is, in small letters: that before ``.gz`` if it is compressed."""
    name = path.name.lower()
    return Path(name.removesuffix(_GZIP)).suffix


def read(path: Path) -> Iterator[Record]:
    """Yield the rows of a file by its suffix (one of `SUFFIXES`, or with ``.gz`` after it).

    Raises:
        DataError: The file cannot be read, or something in it is no row.
    """
    kind = suffix(path)
    if kind not in _READERS:
        raise DataError(
            f"cannot read a {kind or 'nameless'} file", where=str(path), mend=f"Give a {', '.join(SUFFIXES)} file."
        )
    yield from _READERS[kind](_text(path, contents(path)), str(path))


def read_texts(path: Path, column: str = "text") -> Iterator[Record]:
    """Yield rows that have a text, from a file or standard input; plain lines are texts as well.

    A file with one of `SUFFIXES` is what that says. Any other, and standard input, is JSON when its first character is
    ``{`` or it is an array of objects, and else one text a line.

    Args:
        path: The file; `STDIN` for standard input.
        column: Where the text is.

    Raises:
        DataError: The file cannot be read, or something in it is no row or has no text.
    """
    where = str(path)
    data = sys.stdin.buffer.read() if where == STDIN else contents(path)
    text = _text(path, data)
    reader = _READERS.get(suffix(path)) or _READERS.get(_guess(text), _plain)
    place = ""
    for place, row in reader(text, where):
        if column not in row:
            mend = f"Columns there: {', '.join(row)}. Name the text so."
            raise DataError(f"the row has no {column!r}", where=place, mend=mend)
        text_of(row[column], column, place)
        yield place, row
    if not place:
        what = f"there are no rows; a CSV or TSV file begins with the names of its columns, one of them {column!r}"
        raise DataError(what, where=where, mend="Give a file with at least one row.")


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


def _guess(text: str) -> str:
    begin = text.lstrip()
    if begin.startswith("{") or re.match(r"\[\s*\{", begin):
        return ".json"
    return ""


def _plain(text: str, source: str) -> Iterator[Record]:
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, _TwiceError, RecursionError):
            _DECODER.decode(text)
            what, mend = "a JSON array where plain lines are read", 'Write objects such as {"text": "..."}, or lines.'
            raise DataError(what, where=source, mend=mend)
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.removesuffix("\r")
        if not line.strip():
            continue
        where = f"{source}:{number}"
        if line.lstrip().startswith("{"):
            mend = 'Write all lines as JSON objects such as {"text": "..."}, or none.'
            raise DataError("the line begins like JSON in a file of plain lines", where=where, mend=mend)
        require_text(line, "text", where)
        yield where, {"text": line}


def _json(text: str, source: str) -> Iterator[Record]:
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


def _csv(text: str, source: str) -> Iterator[Record]:
    """Commas between cells, or what a header without commas has: many spreadsheets write semicolons."""
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    yield from _table(text, source, delimiter, quoted=True)


def _tsv(text: str, source: str) -> Iterator[Record]:
    """Tabs between cells; quotes enclose cells as in CSV, or are characters like others where every line is a row."""
    if '"' not in text:
        yield from _table(text, source, "\t", quoted=False)
        return
    lines, enclosed, wrong = None, None, None
    with contextlib.suppress(DataError):
        lines = _table(text, source, "\t", quoted=False)
    try:
        enclosed = _table(text, source, "\t", quoted=True)
    except DataError as error:
        wrong = error
    # Of one column every line is a row, so there the quotes tell.
    several = "\t" in text.lstrip().partition("\n")[0]
    if lines is not None and (enclosed is None or (several and len(enclosed) < len(lines))):
        yield from lines
    elif enclosed is not None:
        yield from enclosed
    elif wrong is not None:
        raise wrong


def _table(text: str, source: str, delimiter: str, *, quoted: bool) -> list[Record]:
    rows: list[Record] = []
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)  # the library's is 131,072 characters a cell
    header: list[str] | None = None
    line = 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=quoted, delimiter=delimiter, quoting=quoting)
        for cells in reader:
            where, line = f"{source}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, where)
                continue
            if len(cells) != len(header):
                names = {",": "commas", ";": "semicolons", "\t": "tabs"}
                what = f"{len(cells)} cells where the header has {len(header)}"
                mend = f"Quote cells that contain {names[delimiter]} or line breaks."
                raise DataError(what, where=where, mend=mend)
            row = dict(zip(header, cells, strict=True))
            for column, value in row.items():
                require_text(value, column, where)
            rows.append((where, row))
    except csv.Error as error:
        mend = "Mend the quoting, or use JSONL."
        raise DataError(f"not CSV: {error}", where=f"{source}:{line}", mend=mend) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _header(cells: list[str], where: str) -> list[str]:
    for name in cells:
        if not name.strip() or cells.count(name) > 1:
            what = f"column {name!r} appears twice" if name.strip() else "a column has no name"
            raise DataError(what, where=where, mend="The first line must name every column once.")
        require_text(name, name, where)
    return cells


def _text(path: Path, data: bytes) -> str:
    other = _OTHERS.get(data[:4])
    if other:
        mend = "Write it as JSON lines or CSV."
        raise DataError(f"a {other} file where rows of text are read", where=str(path), mend=mend)
    try:
        packed = data.startswith(_GZIPPED) or path.name.lower().endswith(_GZIP)
        text = (gzip.decompress(data) if packed else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _not_utf8(error, path)
    except (OSError, EOFError, zlib.error):
        raise DataError("the compressed file is damaged", where=str(path), mend="Compress it anew.") from None
    if "\0" in text[:4]:
        raise DataError("not UTF-8 text but UTF-16", where=f"{path}:1", mend="Save the file as UTF-8.")
    if not text.strip():
        raise DataError("the file is empty", where=str(path), mend="Give a file with at least one row.")
    return text


def _not_utf8(error: UnicodeDecodeError, path: Path) -> NoReturn:
    data: bytes = error.object
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        raise DataError("not UTF-8 text but UTF-16", where=f"{path}:1", mend="Save the file as UTF-8.") from None
    line = data.count(b"\n", 0, error.start) + 1
    raise DataError("not UTF-8 text", where=f"{path}:{line}", mend="Save the file as UTF-8.") from None


def contents(path: Path) -> bytes:
    """All of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror}", where=str(path), mend="Check its name and its permissions."
        ) from None


_READERS: dict[str, Callable[[str, str], Iterator[Record]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
