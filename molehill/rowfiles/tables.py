"""Rows as a table with a header: CSV and TSV."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Iterator
from typing import Literal

from molehill.errors import DataError
from molehill.rowfiles.values import Record, require_text


def comma_rows(text: str, source: str) -> Iterator[Record]:
    """Yield the rows of a CSV file: commas between cells, or what a header without commas has.

    Many spreadsheets write semicolons.

    Args:
        text: Of the file.
        source: Its name.

    Raises:
        DataError: Its quotes or its columns do not fit.
    """
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in first), ",")
    yield from _table(text, source, delimiter, quoted=True)


def tab_rows(text: str, source: str) -> Iterator[Record]:
    """Yield the rows of a TSV file: tabs between cells.

    Quotes enclose cells as in CSV, or are characters like others where every line is a row.

    Args:
        text: Of the file.
        source: Its name.

    Raises:
        DataError: Its quotes or its columns do not fit.
    """
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
