"""Every client draws from the same distribution.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629, section 3 (IID).
"""

from __future__ import annotations

import numpy as np

from molehill.registry import register
from molehill.tasks.rows import Rows
from molehill.tasks.units import units
from molehill_simulation.shards import Shard, numbered, spread


@register("partitioner", "iid", paper="McMahan et al. 2017, FedAvg", url="https://arxiv.org/abs/1602.05629")
def iid(*, rows: Rows, clients: int, seed: int) -> list[Shard]:
    """Shuffle and deal evenly.

    Raises:
        DataError: There are fewer units than clients.
    """
    return numbered(spread(units(rows), clients, np.random.default_rng(seed)))
