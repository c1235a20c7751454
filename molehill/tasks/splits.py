"""Folders in which every split has files of its own, as people keep them and as the Hugging Face hub stores them.

A split is a file of its name (``train.jsonl``), its shards (``train-00000-of-00002.parquet``), or a folder of its name
with files, which are read by their names; all that also under ``data/``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from molehill.errors import DataError
from molehill.rowfiles.reading import suffix

_SHARD = re.compile(r"(?P<split>.+)-(?P<at>\d+)-of-(?P<of>\d+)(-[0-9a-f]{16})?")
_USUAL = {"train", "validation", "test"}
_ABOUT = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # what `datasets` writes


def files_of(folder: Path, split: str, readable: Callable[[Path], bool]) -> list[Path]:
    """The files of a split, in order.

    Args:
        folder: With one split or several.
        split: Its name.
        readable: Whether rows can be read from a file of that name.

    Raises:
        DataError: There is no such split, it could be one of several, or a shard is missing; or the folder cannot be
            read.
    """
    try:
        paths = sorted(folder.iterdir())
        ways = [way for part in (folder, folder / "data") for way in _ways(part, readable)]
    except OSError as error:
        what = f"cannot read the folder: {error.strerror}"
        raise DataError(what, where=str(folder), mend="Check its permissions.") from None
    deeper = [path.name for path in paths if path.is_dir() and path.name != "data" and _has_splits(path, readable)]
    if deeper and split not in {name for name, _ in ways}:
        what = f"the splits are one folder deeper, in {', '.join(deeper)}"
        raise DataError(what, where=str(folder), mend="Name one of these folders as data.source.")
    if not ways:
        what = "neither a folder saved by `datasets`, nor one with files of rows"
        mend = "Put rows there as train.jsonl (or .json, .csv, .tsv, .parquet), or name a file."
        raise DataError(what, where=str(folder), mend=mend)
    meant = [paths for name, paths in ways if name == split]
    if not meant:
        there = ", ".join(sorted({name for name, _ in ways}))
        raise DataError(f"there is no split {split!r}", where=str(folder), mend=f"Set data.split to one of {there}.")
    if len(meant) > 1:
        one, other = (paths[0].relative_to(folder) for paths in meant[:2])
        what = f"the split {split!r} could be read from {one}, or from {other}"
        raise DataError(what, where=str(folder), mend="Remove one, or name the file as data.source.")
    return _complete(meant[0])


def _ways(folder: Path, readable: Callable[[Path], bool]) -> Iterator[tuple[str, list[Path]]]:
    """Splits of one folder, each with its files; one that could be read in several ways comes as often."""
    shards: dict[tuple[str, ...], list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.name in _ABOUT:
            continue
        if path.is_dir():
            inside = [each for each in sorted(path.iterdir()) if _is_rows(each, readable)]
            if inside and path.name != "data" and not _has_splits(path, readable):
                yield path.name, inside
        elif _is_rows(path, readable):
            shard = _SHARD.fullmatch(_stem(path))
            if shard is None:
                yield _stem(path), [path]
            else:
                shards.setdefault((shard["split"], shard["of"], suffix(path)), []).append(path)
    for (split, *_), paths in shards.items():
        yield split, paths


def _has_splits(folder: Path, readable: Callable[[Path], bool]) -> bool:
    """Whether a folder is no split but has some, as a data set with several subsets has one for each."""
    names = {shard["split"] if (shard := _SHARD.fullmatch(_stem(path))) else _stem(path)
             for path in folder.iterdir() if _is_rows(path, readable)}  # fmt: skip
    return bool(names & _USUAL - {folder.name})


def _complete(paths: list[Path]) -> list[Path]:
    """Files of a split in order, of which no shard is missing."""
    found = [shard for path in paths if (shard := _SHARD.fullmatch(_stem(path)))]
    if len(found) < len(paths):
        return paths
    numbers = [int(shard["at"]) for shard in found]
    many = int(found[0]["of"])
    if sorted(numbers) != list(range(len(numbers))) or len(numbers) != many:
        missing = next(at for at in range(len(numbers) + 1) if at not in numbers)
        what = f"{len(numbers)} of {many} shards are there, and number {missing} (from 0) is not"
        raise DataError(what, where=str(paths[0].parent), mend="Get all files of the split.")
    return [path for _, path in sorted(zip(numbers, paths, strict=True))]


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _is_rows(path: Path, readable: Callable[[Path], bool]) -> bool:
    return path.is_file() and not path.name.startswith(".") and readable(path)
