"""A small immutable table that knows where every row came from."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Any

from molehill.errors import DataError

# Columns that only Molehill makes: a source's own `task` and `group` mean what their owner says.
TASK = "molehill.task"
DOMAIN = "molehill.domain"
GROUP = "molehill.group"
STRATUM = "molehill.stratum"  # what held-out rows are to be alike in, where that is not the label


@dataclass(frozen=True)
class Rows:
    """Columns of equal length; a value a row lacks is None.

    Attributes:
        columns: Values by column name.
        where: Place of every row for error messages, such as ``reviews.csv:12``.
        source: What was read, for errors that concern all rows.
        read: Columns that the task reads; empty where nobody has said.
    """

    columns: Mapping[str, tuple[Any, ...]]
    where: tuple[str, ...]
    source: str
    read: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if any(length != len(self.where) for length in lengths.values()):
            raise ValueError(f"columns of {lengths} values for {len(self.where)} rows")
        object.__setattr__(self, "columns", MappingProxyType(dict(self.columns)))

    @classmethod
    def from_records(cls, records: Iterable[tuple[str, Mapping[str, Any]]], source: str) -> Rows:
        """Build a table from ``(where, {column: value})`` pairs; columns are the union over rows, in order met."""
        pairs = list(records)
        names = dict.fromkeys(name for _, record in pairs for name in record)
        columns = {name: tuple(record.get(name) for _, record in pairs) for name in names}
        return cls(columns, tuple(where for where, _ in pairs), source)

    @classmethod
    def joined(cls, parts: Sequence[Rows], source: str) -> Rows:
        """The rows of several tables, in order; a column that one of them lacks has no values there."""
        names = dict.fromkeys(name for part in parts for name in part.columns)
        columns = {
            name: tuple(chain.from_iterable(part.columns.get(name, (None,) * len(part)) for part in parts))
            for name in names
        }
        read = dict.fromkeys(name for part in parts for name in part.read)
        return cls(columns, tuple(chain.from_iterable(part.where for part in parts)), source, tuple(read))

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        """Values of a column.

        Raises:
            DataError: No row has this column; names the nearest.
        """
        if name in self.columns:
            return self.columns[name]
        near = difflib.get_close_matches(name, self.columns, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"there is no column {name!r}",
            where=self.source,
            mend=f"{hint}Columns there: {', '.join(self.columns)}. Map yours with data.columns.",
        )

    def told(self) -> Iterator[tuple[int | None, int | None]]:
        """Task and domain of every row, None where rows have none."""
        none = (None,) * len(self)
        return zip(self.columns.get(TASK, none), self.columns.get(DOMAIN, none), strict=True)

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(where, {column: value})`` of every row."""
        for i, where in enumerate(self.where):
            yield where, {name: values[i] for name, values in self.columns.items()}

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        columns = {name: tuple(values[i] for i in indices) for name, values in self.columns.items()}
        return replace(self, columns=columns, where=tuple(self.where[i] for i in indices))

    def having(self, **columns: Sequence[Any]) -> Rows:
        """The same rows with columns added or replaced."""
        return replace(self, columns={**self.columns, **{k: tuple(v) for k, v in columns.items()}})

    def only(self, names: Collection[str]) -> Rows:
        """The same rows without other columns than these."""
        return replace(self, columns={name: values for name, values in self.columns.items() if name in names})

    def renamed(self, columns: Mapping[str, str]) -> Rows:
        """The same rows with columns under the names that ``columns`` maps to them.

        Args:
            columns: Our name to theirs, for example ``{"text": "review"}``.

        Raises:
            DataError: A column it names is not there.
        """
        mapped = {ours: self[theirs] for ours, theirs in columns.items()}
        rest = {k: v for k, v in self.columns.items() if k not in mapped and k not in columns.values()}
        return replace(self, columns={**mapped, **rest})
