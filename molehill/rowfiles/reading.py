"""Files of rows: which form one has, by its name or its first characters, and its text."""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from molehill.errors import DataError
from molehill.rowfiles import arrow, objects, tables
from molehill.rowfiles.values import Record, require_text, text_of

STDIN = "-"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_GZIP = ".gz"
_GZIPPED = b"\x1f\x8b"
_OTHERS = {arrow.MAGIC: "a Parquet", b"PK\x03\x04": "a spreadsheet or zip", b"ARRO": "an Arrow"}  # by their first bytes

_WORDS = "tokens"


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

    Of a row with ``tokens`` in place of a text, as some are trained on, these are it, with a space between two.

    A file with one of `SUFFIXES`, or that of Parquet, is what that says. Any other, and standard input, is Parquet when
    it begins like it, JSON when its first character is ``{`` or it is an array of objects, and else one text a line.

    Args:
        path: The file; `STDIN` for standard input.
        column: Where the text is.

    Raises:
        ConfigError: It is Parquet, and pyarrow is not installed.
        DataError: The file cannot be read, or something in it is no row or has no text.
    """
    for place, row in read_any(path, column):
        if column not in row:
            words = row.get(_WORDS)
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                mend = f"Columns there: {', '.join(row)}. Name the text so."
                raise DataError(f"the row has no {column!r}", where=place, mend=mend)
            yield place, {**row, column: text_of(" ".join(words), _WORDS, place)}
            continue
        text_of(row[column], column, place)
        yield place, row


def read_any(path: Path, column: str = "text") -> Iterator[Record]:
    """Yield the rows of a file of any form, as `read_texts` tells them apart, whatever their columns.

    Args:
        path: The file; `STDIN` for standard input.
        column: One that rows have, for the message where there are none.

    Raises:
        ConfigError: It is Parquet, and pyarrow is not installed.
        DataError: The file cannot be read, or something in it is no row, or there is none.
    """
    where, place = str(path), ""
    data = sys.stdin.buffer.read() if where == STDIN else contents(path)
    for place, row in _records(path, data):
        yield place, row
    if not place:
        what = f"there are no rows; a CSV or TSV file begins with the names of its columns, one of them {column!r}"
        raise DataError(what, where=where, mend="Give a file with at least one row.")


def _records(path: Path, data: bytes) -> Iterator[Record]:
    if path.suffix.lower() == arrow.PARQUET or (suffix(path) not in _READERS and data.startswith(arrow.MAGIC)):
        return arrow.rows(data, str(path))
    text = _text(path, data)
    reader = _READERS.get(suffix(path)) or _READERS.get(_guess(text), _plain)
    return reader(text, str(path))


def _guess(text: str) -> str:
    begin = text.lstrip()
    if begin.startswith("{") or re.match(r"\[\s*\{", begin):
        return ".json"
    return ""


def _plain(text: str, source: str) -> Iterator[Record]:
    if text.lstrip().startswith("[") and objects.is_json(text):
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


def _text(path: Path, data: bytes) -> str:
    other = _OTHERS.get(data[:4])
    if other:
        mend = "Write it as JSON lines or CSV."
        raise DataError(f"{other} file where rows of text are read", where=str(path), mend=mend)
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
    ".jsonl": objects.rows,
    ".ndjson": objects.rows,
    ".json": objects.rows,
    ".csv": tables.comma_rows,
    ".tsv": tables.tab_rows,
}
