"""Every client draws from the same distribution.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
https://arxiv.org/abs/1602.05629, section 3 (IID).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from molehill.errors import ConfigError
from molehill.registry import register
from molehill.tasks.rows import Rows
from molehill.tasks.units import units
from molehill.words import counted
from molehill_simulation.shards import Shard, numbered, spread


@dataclass(frozen=True)
class IidParams:
    """Parameters of `iid`.

    Attributes:
        names: What the clients are called, in their order; ``client-1``, ``client-2``, ... when omitted.
    """

    names: tuple[str, ...] = ()


@register(
    "partitioner", "iid", params=IidParams, paper="McMahan et al. 2017, FedAvg", url="https://arxiv.org/abs/1602.05629"
)
def iid(params: IidParams, *, rows: Rows, clients: int, seed: int) -> list[Shard]:
    """Shuffle and deal evenly.

    Raises:
        ConfigError: There is not one name for each client.
        DataError: There are fewer units than clients.
    """
    dealt = numbered(spread(units(rows), clients, np.random.default_rng(seed)))
    if not params.names:
        return dealt
    if len(set(params.names)) < len(params.names) or len(params.names) != clients:
        what = f"different names: {len(set(params.names))}, for {counted(clients, 'client')}"
        raise ConfigError(what, where="data.partition.names", mend="Give each client one, or leave them out.")
    return [replace(shard, name=name) for shard, name in zip(dealt, params.names, strict=True)]
