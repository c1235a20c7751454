"""Clients follow a column of the data: an author, a domain, a hospital.

Caldas et al. 2018, "LEAF: A Benchmark for Federated Settings", https://arxiv.org/abs/1812.01097 (natural partitions).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from molehill.errors import DataError
from molehill.registry import register
from molehill.tasks.rows import Rows
from molehill.tasks.units import Unit, units
from molehill_simulation.shards import Shard, distinct, file_safe, numbered, spread, values_of


@dataclass(frozen=True)
class ByColumnParams:
    """Parameters of `by_column`.

    Attributes:
        column: Name of the column.
    """

    column: str


@register(
    "partitioner",
    "by_column",
    params=ByColumnParams,
    paper="Caldas et al. 2018, LEAF",
    url="https://arxiv.org/abs/1812.01097",
)
def by_column(params: ByColumnParams, *, rows: Rows, clients: int, seed: int) -> list[Shard]:
    """Give every value of a column clients of its own.

    With at least as many clients as values, each value gets ``clients // values`` of them (the values with most rows
    one more, if that does not come out even), named ``VALUE-1``, ``VALUE-2``, ... With fewer clients than values,
    whole values are dealt so that clients have nearly equal numbers of rows.

    Raises:
        DataError: The column or a value is missing, or a value has fewer units than clients.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[Unit]] = {}
    column = values_of(rows, params.column)
    for unit in units(rows):
        inside: dict[str, Unit] = {}
        for i in unit:  # a unit may span values; its parts then go to different clients
            if column[i] is None or not str(column[i]).strip():
                raise DataError(f"the row has no {params.column!r}", where=rows.where[i], mend="Fill it in.")
            inside.setdefault(str(column[i]), []).append(i)
        for value, part in inside.items():
            values.setdefault(value, []).append(part)
    if clients < len(values):
        return numbered(spread([list(chain.from_iterable(values[value])) for value in sorted(values)], clients, rng))
    each, more = divmod(clients, len(values))
    largest = sorted(values, key=lambda value: (-sum(map(len, values[value])), value))[:more]
    shards: list[Shard] = []
    for value in sorted(values):
        count = each + (value in largest)
        names = [file_safe(value)] if count == 1 else [f"{file_safe(value)}-{n}" for n in range(1, count + 1)]
        dealt = spread(values[value], count, rng)
        shards += [Shard(name, indices, value) for name, indices in zip(names, dealt, strict=True)]
    return distinct(shards)
