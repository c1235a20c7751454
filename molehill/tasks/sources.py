"""Reads rows from files, `datasets` folders, the Hugging Face hub and samples."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molehill.errors import DataError, first_line
from molehill.files import place_of
from molehill.rowfiles import arrow, reading
from molehill.tasks import samples, splits
from molehill.tasks.rows import Rows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = (
    "a .jsonl, .json, .csv, .tsv (or .gz of these) or .parquet file, a folder saved by `datasets` or with such files, "
    "a hub id, or sample:reviews"
)


def read_rows(source: str, *, split: str = "train") -> Rows:
    """Read all rows of a source.

    Args:
        source: JSONL, JSON, CSV or TSV file (also with ``.gz``), Parquet file, folder saved by ``datasets`` or with
            such files by split (see `molehill.tasks.splits`), hub id, or ``sample:reviews``.
        split: Split of a folder or hub id; other sources have none.

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
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return _folder(path, split) if saved else _files(path, split)
    read = _FILES.get(reading.suffix(path))
    if read is not None:
        return read(path)
    if path.exists():
        raise DataError(f"cannot read a {path.suffix or 'nameless'} file", where=source, mend=f"Give {_KINDS}.")
    if not _HUB_ID.fullmatch(source):
        raise DataError("no such file or folder", where=source, mend=f"Give {_KINDS}.")
    return _hub(source, split)


def _parquet(path: Path) -> Rows:
    return Rows(*arrow.parquet(reading.contents(path), str(path)), str(path))


def _files(folder: Path, split: str) -> Rows:
    """Rows of all files of a split; a column that a file lacks has no values there."""
    paths = splits.files_of(folder, split, lambda path: reading.suffix(path) in _FILES)
    return Rows.joined([_FILES[reading.suffix(path)](path) for path in paths], str(folder))


def _folder(path: Path, split: str) -> Rows:
    import datasets  # noqa: PLC0415  (takes a second to import; only this source needs it)

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
    """Rows of a `datasets.Dataset`; class labels, and those in lists, become their names."""
    stored = table.with_format("arrow")[:]  # as stored: images and sounds would be decoded, by libraries not here
    rows = Rows(*arrow.checked({name: stored.column(name) for name in table.column_names}, source), source)
    named: dict[str, list[Any]] = {}
    for name, feature in table.features.items():
        inner = getattr(feature, "feature", None)
        if type(feature).__name__ == "ClassLabel":
            named[name] = [_named(feature, value) for value in rows[name]]
        elif type(inner).__name__ == "ClassLabel":
            named[name] = [value and [_named(inner, each) for each in value] for value in rows[name]]
    return rows.having(**named)


def _named(feature: Any, value: int | None) -> str | None:
    """Name of a class; None where there is none."""
    return str(feature.int2str(value)) if value is not None and value >= 0 else None


def _rows(path: Path) -> Rows:
    return Rows.from_records(reading.read(path), str(path))


_FILES: dict[str, Callable[[Path], Rows]] = {**dict.fromkeys(reading.SUFFIXES, _rows), arrow.PARQUET: _parquet}
