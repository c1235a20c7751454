"""Reads rows from files, `datasets` folders, the Hugging Face hub and samples."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from molehill.errors import DataError
from molehill.tasks import samples
from molehill.tasks.rows import Rows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = "a .jsonl, .csv or .parquet file, a folder saved by `datasets`, a hub id, or sample:reviews"


def read_rows(source: str, *, split: str = "train") -> Rows:
    """Read all rows of a source.

    Args:
        source: JSONL, CSV or Parquet file, folder saved by ``datasets``, hub id, or ``sample:reviews``.
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
    path = Path(source).expanduser()
    return path.exists() or path.suffix.lower() in _FILES or not _HUB_ID.fullmatch(source)


def _read(source: str, split: str) -> Rows:
    path = Path(source).expanduser()
    if source.startswith("sample:"):
        return samples.read_sample(source)
    if path.is_dir():
        return _folder(path, split)
    read = _FILES.get(path.suffix.lower())
    if read is not None:
        return read(path)
    if path.exists():
        raise DataError(f"cannot read a {path.suffix or 'nameless'} file", where=source, mend=f"Give {_KINDS}.")
    if not _HUB_ID.fullmatch(source):
        raise DataError("no such file or folder", where=source, mend=f"Give {_KINDS}.")
    return _hub(source, split)


def _jsonl(path: Path) -> Rows:
    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        # Only \n ends a JSON line; str.splitlines would also cut at U+2028 inside strings.
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise DataError(f"not JSON: {reason}", where=where, mend="Write one JSON object per line.") from None
            if not isinstance(value, dict):
                raise DataError("not a JSON object", where=where, mend="Write one JSON object per line.")
            yield where, value

    return Rows.from_records(records(), str(path))


def _csv(path: Path) -> Rows:
    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _header(cells, where)
                elif len(cells) != len(header):
                    raise DataError(
                        f"{len(cells)} cells where the header has {len(header)}",
                        where=where,
                        mend="Quote cells that contain commas or line breaks.",
                    )
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(
                f"not CSV: {error}", where=f"{path}:{line}", mend="Mend the quoting, or use JSONL."
            ) from None

    return Rows.from_records(records(), str(path))


def _header(cells: list[str], where: str) -> list[str]:
    for name in cells:
        if not name.strip() or cells.count(name) > 1:
            what = f"column {name!r} appears twice" if name.strip() else "a column has no name"
            raise DataError(what, where=where, mend="The first line must name every column once.")
    return cells


def _parquet(path: Path) -> Rows:
    import pyarrow as pa  # noqa: PLC0415  (heavy; only this format needs it)
    import pyarrow.parquet as pq  # noqa: PLC0415  (the same)

    if not _bytes(path):
        raise DataError("the file is empty", where=str(path), mend="Give a file with at least one row.")
    try:
        table = pq.read_table(path)
        columns = {name: tuple(table.column(i).to_pylist()) for i, name in enumerate(table.column_names)}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"not a Parquet file: {_first_line(error)}", where=str(path), mend="Write it anew.") from None
    return Rows(columns, tuple(f"{path}:{n}" for n in range(1, table.num_rows + 1)), str(path))


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
        raise DataError(
            f"cannot read the folder: {_first_line(error)}", where=str(path), mend="Save it anew."
        ) from None


def _hub(name: str, split: str) -> Rows:
    import datasets  # noqa: PLC0415  (takes a second to import; only this source needs it)
    import httpx  # noqa: PLC0415  (the hub client's transport; its errors escape `datasets`)

    showed = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _dataset(datasets.load_dataset(name, split=split), name)
    except (OSError, ValueError, KeyError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load it from the hub, and there is no such file: {_first_line(error)}",
            where=name,
            mend="Check the name, data.split and the network, or give a local file.",
        ) from None
    finally:
        if not showed:
            datasets.enable_progress_bars()


def _dataset(table: Any, source: str) -> Rows:
    """Rows of a `datasets.Dataset`; class labels become their names."""
    columns = {name: table[name][:] for name in table.column_names}
    for name, feature in table.features.items():
        if type(feature).__name__ == "ClassLabel":
            columns[name] = [feature.int2str(v) if v is not None and v >= 0 else None for v in columns[name]]
    where = tuple(f"{source}:{n}" for n in range(1, table.num_rows + 1))
    return Rows({name: tuple(values) for name, values in columns.items()}, where, source)


def _text(path: Path) -> str:
    data = _bytes(path)
    if not data.strip():
        raise DataError("the file is empty", where=str(path), mend="Give a file with at least one row.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("not UTF-8 text", where=f"{path}:{line}", mend="Save the file as UTF-8.") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror}", where=str(path), mend="Check data.source and its permissions."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
