"""What a partitioner makes of units of rows that must stay together: shards, each with the name of a client."""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import numpy as np

from molehill import registry
from molehill.errors import DataError
from molehill.tasks.rows import Rows
from molehill.tasks.units import Unit

_RESERVED = ("state.key",)  # lies among the folders of clients


@dataclass(frozen=True)
class Shard:
    """The rows of one client.

    Attributes:
        name: Name of the client; safe as a file name.
        indices: Row indices.
        owner: Who the rows are of, as the data say; empty where they do not.
    """

    name: str
    indices: list[int]
    owner: str = ""


def values_of(rows: Rows, column: str) -> tuple[Any, ...]:
    """Values of the column by which rows are dealt.

    Raises:
        DataError: No row has this column.
    """
    if column in rows.columns:
        return rows.columns[column]
    takes = {method.name: "column" in get_type_hints(method.params) for method in registry.methods("partitioner")}
    raise DataError(
        f"there is no column {column!r} to deal the rows by",
        where=rows.source,
        mend=f"Columns there: {', '.join(rows.columns)}. Name one in data.partition, as the column of "
        f"{registry.either(name for name in takes if takes[name])}, or use "
        f"{registry.either(name for name in takes if not takes[name])}, which need none.",
    )


def spread(parts: Sequence[Unit], bins: int, rng: np.random.Generator) -> list[Unit]:
    """Deal units at random into ``bins`` of nearly equal numbers of rows (largest first, to the emptiest).

    Raises:
        DataError: There are fewer units than bins.
    """
    need_units(parts, bins)
    order = sorted(rng.permutation(len(parts)), key=lambda i: -len(parts[i]))
    heap = [(0, b) for b in range(bins)]
    dealt: list[Unit] = [[] for _ in range(bins)]
    for i in order:
        size, b = heapq.heappop(heap)
        dealt[b] += parts[i]
        heapq.heappush(heap, (size + len(parts[i]), b))
    return [sorted(rows) for rows in dealt]


def need_units(parts: Sequence[Unit], clients: int) -> None:
    """Refuse to deal fewer units than clients.

    Raises:
        DataError: There are fewer.
    """
    if len(parts) < clients:
        total = sum(map(len, parts))
        raise DataError(
            f"{total} rows make {len(parts)} units that can be dealt (rows of one group or with the same content stay "
            f"together), fewer than the {clients} clients they are for",
            where="data.clients",
            mend="Lower data.clients, or give more rows.",
        )


def numbered(dealt: Sequence[Unit]) -> list[Shard]:
    """Shards named ``client-1``, ``client-2``, ..."""
    return [Shard(f"client-{number}", indices) for number, indices in enumerate(dealt, start=1)]


def file_safe(value: object) -> str:
    """A value of a column as part of a client's name: letters and digits of any script stay, all else is a dash.

    A value of symbols alone is written by their Unicode names; ``none`` is one of nothing.
    """
    text = unicodedata.normalize("NFC", str(value))
    name = re.sub("-{2,}", "-", "".join(char if _in_a_name(char) else "-" for char in text).strip("-._"))
    while name and not name[0].isalnum():
        name = name[1:]
    if not name:
        symbols = " ".join(unicodedata.name(char, f"u{ord(char):x}").lower() for char in text if not char.isspace())
        name = re.sub("[^a-z0-9]+", "-", symbols).strip("-")
    return name[:40].rstrip("-.") or "none"


def distinct(shards: Sequence[Shard]) -> list[Shard]:
    """Number names that two values share, also for file systems that ignore case or the form of characters."""
    seen: dict[str, int] = dict.fromkeys(_RESERVED, 1)
    taken = {_folded(shard.name) for shard in shards}
    result = []
    for shard in shards:
        name, key = shard.name, _folded(shard.name)
        seen[key] = seen.get(key, 0) + 1
        while seen[key] > 1 and _folded(name := f"{shard.name}_{seen[key]}") in taken:
            seen[key] += 1
        taken.add(_folded(name))
        result.append(replace(shard, name=name))
    return result


def _in_a_name(char: str) -> bool:
    return char.isalnum() or char in "_.-" or unicodedata.category(char)[0] == "M"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
