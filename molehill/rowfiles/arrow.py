"""Rows as columns of Apache Arrow: Parquet files, and what else is stored so. Needs pyarrow, the extra ``parquet``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molehill.errors import DataError, first_line
from molehill.extras import needs
from molehill.rowfiles.values import Record, require_text

PARQUET = ".parquet"  # the suffix
MAGIC = b"PAR1"  # the first bytes
Columns = dict[str, tuple[Any, ...]]


def parquet(data: bytes, source: str) -> tuple[Columns, tuple[str, ...]]:
    """The columns of a Parquet file, and the place of every row.

    Args:
        data: All of the file.
        source: Its name.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: It is no such file, names a column twice, or holds a string that is no text.
    """
    with needs("parquet"):
        import pyarrow as pa  # noqa: PLC0415  (heavy; only this format needs it)
        import pyarrow.parquet as pq  # noqa: PLC0415  (the same)

    if not data:
        raise DataError("the file is empty", where=source, mend="Give a file with at least one row.")
    try:
        names = pq.read_schema(pa.BufferReader(data)).names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"two columns are called {twice!r}", where=source, mend="Remove one of them.")
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file: {first_line(error)}", where=source, mend="Write it anew.") from None
    return checked({name: table.column(i) for i, name in enumerate(table.column_names)}, source)


def rows(data: bytes, source: str) -> Iterator[Record]:
    """Yield the rows of a Parquet file; arguments and errors as of `parquet`.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: It is no such file, or holds a string that is no text.
    """
    columns, places = parquet(data, source)
    for number, place in enumerate(places):
        yield place, {name: values[number] for name, values in columns.items()}


def checked(columns: Mapping[str, Any], source: str) -> tuple[Columns, tuple[str, ...]]:
    """The values of Arrow columns, in which every string is text, and the place of every row.

    Raises:
        DataError: A string is no Unicode text; names row and column.
    """
    where = tuple(f"{source}:{n}" for n in range(1, len(next(iter(columns.values()), ())) + 1))
    found = {name: _values(column, name, where) for name, column in columns.items()}
    for name, values in found.items():
        for place, value in zip(where, values, strict=True):
            require_text(value, name, place)
    return found, where


def _values(column: Any, name: str, where: Sequence[str]) -> tuple[Any, ...]:
    """Values of an Arrow column as Python's; those that Python cannot hold, such as nanoseconds, in Arrow's words."""
    import pyarrow as pa  # noqa: PLC0415  (heavy; few sources need it)

    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):  # text, unless it is none
        with contextlib.suppress(pa.ArrowException):
            column = column.cast(pa.large_string())
    try:
        found = column.to_pylist()
        return tuple(map(_without_nulls, found)) if pa.types.is_nested(column.type) else tuple(found)
    except UnicodeDecodeError:
        for place, cell in zip(where, column, strict=True):
            try:
                cell.as_py()
            except UnicodeDecodeError:
                raise DataError(f"{name!r} is not UTF-8 text", where=place, mend="Write the text anew.") from None
        raise
    except (pa.ArrowException, ValueError, TypeError, OverflowError, ImportError):
        try:
            return tuple(column.cast(pa.string()).to_pylist())
        except pa.ArrowException:
            return tuple(str(cell) for cell in column)


def _without_nulls(value: Any) -> Any:
    """A value without the keys that Arrow fills in with null, since others of its column have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
