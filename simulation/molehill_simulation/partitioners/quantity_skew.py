"""Clients differ in how much they have, not in what.

Li et al. 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study" (NIID-Bench),
https://arxiv.org/abs/2102.02079, section 4.3 (quantity skew).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molehill.errors import DataError
from molehill.registry import register
from molehill.tasks.rows import Rows
from molehill.tasks.units import units
from molehill_simulation.shards import Shard, need_units, numbered


@dataclass(frozen=True)
class QuantitySkewParams:
    """Parameters of `quantity_skew`.

    Attributes:
        alpha: Concentration, above 0: small is skewed, large is even.
        min_rows: Every client gets about this many rows before the rest are dealt.
    """

    alpha: float = 0.5
    min_rows: int = 10

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.min_rows < 1:
            raise ValueError("alpha must be above 0 and min_rows at least 1")


@register(
    "partitioner",
    "quantity_skew",
    params=QuantitySkewParams,
    paper="Li et al. 2022, NIID-Bench",
    url="https://arxiv.org/abs/2102.02079",
)
def quantity_skew(params: QuantitySkewParams, *, rows: Rows, clients: int, seed: int) -> list[Shard]:
    """Shuffle, and cut at sizes drawn from Dirichlet(alpha).

    Raises:
        DataError: There are too few rows or units for so many clients.
    """
    rng = np.random.default_rng(seed)
    parts = units(rows)
    need_units(parts, clients)
    spare = len(rows) - clients * params.min_rows
    if spare < 0:
        raise DataError(
            f"{len(rows)} rows are too few for {clients} clients of at least {params.min_rows}",
            where="data.partition",
            mend="Lower min_rows or data.clients, or give more rows.",
        )
    ends = np.cumsum(params.min_rows + spare * rng.dirichlet(np.full(clients, params.alpha)))
    dealt: list[list[int]] = [[] for _ in range(clients)]
    done, client = 0, 0
    order = rng.permutation(len(parts))
    for position, index in enumerate(order):
        # Go on to the next client once this one is full, or when the units left are only just enough for the rest.
        short = len(order) - position <= clients - 1 - client
        if dealt[client] and client < clients - 1 and (done >= ends[client] or short):
            client += 1
        dealt[client] += parts[index]
        done += len(parts[index])
    return numbered([sorted(indices) for indices in dealt])
