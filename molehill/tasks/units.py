"""Rows that must stay together: were one of them trained on and another held out, a score would measure memory."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

from molehill.tasks.rows import GROUP, Rows
from molehill.tasks.schema import content_keys

Unit: TypeAlias = list[int]  # row indices


def units(rows: Rows) -> list[Unit]:
    """Rows that belong together: those of the same group (column `GROUP`), or of the same content.

    Two rows of one document share its context, and twins are one row: those that differ only in case, punctuation,
    white space or Unicode form (see `content_keys`). Both relations are closed transitively.

    Returns:
        Disjoint units that hold every row, in order of their first row.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    groups = rows.columns.get(GROUP, (None,) * len(rows))
    for keys in ([None if group is None else str(group) for group in groups], content_keys(rows)):
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key is not None:
                a, b = root(first.setdefault(key, i)), root(i)
                parent[max(a, b)] = min(a, b)
    found: dict[int, Unit] = {}
    for i in range(len(rows)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())


def lots(rows: Rows, purpose: str) -> list[float]:
    """A number of [0, 1) for every row, which decides whether it is used for something; alike within a unit.

    It follows from the purpose and from what the unit is: the names of its groups, or else its contents. So it is the
    same whatever the seed, whatever other rows there are, and in whatever order; a unit that grows rarely gets another.

    Args:
        rows: Checked rows.
        purpose: Numbers for different purposes have nothing to do with each other.
    """
    groups, contents = rows.columns.get(GROUP, (None,) * len(rows)), content_keys(rows)
    drawn = [0.0] * len(rows)
    for unit in units(rows):
        names = {f"group {groups[i]}" for i in unit if groups[i] is not None} or {contents[i] for i in unit}
        first = min(hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in names)
        lot = int.from_bytes(hashlib.sha256(purpose.encode() + first).digest()[:6], "big") / 2**48
        for i in unit:
            drawn[i] = lot
    return drawn


def set_aside(rows: Rows, fraction: float) -> list[bool]:
    """Of every row whether it is set aside for validation, whoever's it is: never trained on, never a test row.

    Args:
        rows: Checked rows.
        fraction: Part of the units that is.
    """
    return [lot < fraction for lot in lots(rows, "validation")] if fraction else [False] * len(rows)


def numbers(rows: Rows) -> list[int]:
    """Of every row the number of its unit, which are counted from 0 in order of their first row."""
    of = [0] * len(rows)
    for number, unit in enumerate(units(rows)):
        for i in unit:
            of[i] = number
    return of
