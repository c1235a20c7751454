"""What a page or a table shows of very many: so many rows that it stays readable, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

MOST = 100  # clients, or rows of a list

T = TypeVar("T")


class Few(list[T]):
    """The first rows of a list.

    Args:
        rows: All of them.

    Attributes:
        more: How many were left out.
    """

    def __init__(self, rows: Iterable[T]) -> None:
        every = list(rows)
        super().__init__(every[:MOST])
        self.more = len(every) - len(self)


def spread(ranked: Sequence[T]) -> list[T]:
    """All of a ranking, or `MOST` places of it at equal distances, the first and the last among them."""
    if len(ranked) <= MOST:
        return list(ranked)
    return [ranked[round(place * (len(ranked) - 1) / (MOST - 1))] for place in range(MOST)]
