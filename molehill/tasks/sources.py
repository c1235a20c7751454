"""Reads rows from files, `datasets` folders, the Hugging Face hub and samples."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molehill.errors import DataError, first_line
from molehill.files import place_of
from molehill.rowfiles import reading
from molehill.rowfiles.values import require_text
from molehill.tasks import samples
from molehill.tasks.rows import Rows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = (
    "a .jsonl, .json, .csv, .tsv (or .gz of these) or .parquet file, a folder saved by `datasets`, a hub id, or "
    "sample:reviews"
)


def read_rows(source: str, *, split: str = "train") -> Rows:
    """Read all rows of a source.

    Args:
        source: JSONL, JSON, CSV or TSV file (also with ``.gz``), Parquet file, folder saved by ``datasets``, hub id,
            or ``sample:reviews``.
        split: Split of a ``datasets`` folder or hub id; other sources have none.

    Returns:
        The rows with every column of the source.

    Raises:
        DataError: The source cannot be found, read or parsed, or has no rows.
    """
    rows = _read(source, split)
    if not len(rows):
        raise DataError("there are no rows", where=source, mend="Give a source with at least one row.")
    return rows


def is_local(source: str) -> bool:
    """Whether a source is read without a network: neither from the hub, nor a sample that has to be fetched first."""
    if source.startswith("sample:"):
        return not samples.needs_download(source)
    path = place_of(source, DataError)
    return path.exists() or reading.suffix(path) in _FILES or not _HUB_ID.fullmatch(source)


def _read(source: str, split: str) -> Rows:
    if source.startswith("sample:"):
        return samples.read_sample(source)
    path = place_of(source, DataError)
    if path.is_dir():
        return _folder(path, split)
    read = _FILES.get(reading.suffix(path))
    if read is not None:
        return read(path)
    if path.exists():
        raise DataError(f"cannot read a {path.suffix or 'nameless'} file", where=source, mend=f"Give {_KINDS}.")
    if not _HUB_ID.fullmatch(source):
        raise DataError("no such file or folder", where=source, mend=f"Give {_KINDS}.")
    return _hub(source, split)


def _parquet(path: Path) -> Rows:
    import pyarrow as pa  # noqa: PLC0415  (heavy; only this format needs it)
    import pyarrow.parquet as pq  # noqa: PLC0415  (the same)

    data = reading.contents(path)
    if not data:
        raise DataError("the file is empty", where=str(path), mend="Give a file with at least one row.")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file: {first_line(error)}", where=str(path), mend="Write it anew.") from None
    return _checked({name: table.column(i) for i, name in enumerate(table.column_names)}, str(path))


def _checked(columns: Mapping[str, Any], source: str) -> Rows:
    """Rows of Arrow columns, in which every string is text.

    Raises:
        DataError: A string is no Unicode text; names row and column.
    """
    where = tuple(f"{source}:{n}" for n in range(1, len(next(iter(columns.values()), ())) + 1))
    found = {name: _values(column, name, where) for name, column in columns.items()}
    for name, values in found.items():
        for place, value in zip(where, values, strict=True):
            require_text(value, name, place)
    return Rows(found, where, source)


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


def _folder(path: Path, split: str) -> Rows:
    import datasets  # noqa: PLC0415  (takes a second to import; only this source needs it)

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            "not a folder saved by `datasets`",
            where=str(path),
            mend="Save one with Dataset.save_to_disk, or name a file.",
        )
    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(
                    f"there is no split {split!r}",
                    where=str(path),
                    mend=f"Set data.split to one of {', '.join(found)}.",
                )
            found = found[split]
        return _dataset(found, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the folder: {first_line(error)}", where=str(path), mend="Save it anew.") from None


def _hub(name: str, split: str) -> Rows:
    import datasets  # noqa: PLC0415  (takes a second to import; only this source needs it)
    import httpx  # noqa: PLC0415  (the hub client's transport; its errors escape `datasets`)

    showed = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _dataset(datasets.load_dataset(name, split=split), name)
    except (
        *(OSError, ValueError, KeyError, ImportError),
        *(httpx.HTTPError, httpx.InvalidURL),  # the second of proxy variables, as an error of import is
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"cannot load it from the hub, and there is no such file: {first_line(error)}",
            where=name,
            mend="Check the name, data.split and the network, or give a local file.",
        ) from None
    finally:
        if not showed:
            datasets.enable_progress_bars()


def _dataset(table: Any, source: str) -> Rows:
    """Rows of a `datasets.Dataset`; class labels become their names."""
    arrow = table.with_format("arrow")[:]  # as stored: images and sounds would be decoded, by libraries not here
    rows = _checked({name: arrow.column(name) for name in table.column_names}, source)
    named = {
        name: [feature.int2str(v) if v is not None and v >= 0 else None for v in rows[name]]
        for name, feature in table.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    return rows.having(**named)


def _rows(path: Path) -> Rows:
    return Rows.from_records(reading.read(path), str(path))


_FILES: dict[str, Callable[[Path], Rows]] = {**dict.fromkeys(reading.SUFFIXES, _rows), ".parquet": _parquet}
