"""Clients differ in their mix of labels: each label is divided over clients in Dirichlet proportions.

Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", https://arxiv.org/abs/1905.12022;
the sampling is that of flwr-datasets.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np

from molehill.errors import DataError
from molehill.registry import register
from molehill.tasks.rows import STRATUM, Rows
from molehill.tasks.units import units
from molehill_simulation.shards import Shard, need_units, numbered, values_of


@dataclass(frozen=True)
class DirichletParams:
    """Parameters of `dirichlet`.

    Attributes:
        alpha: Concentration, above 0: small is skewed, large is even.
        column: Column whose values are divided.
        min_units: Every client gets at least this many units (rows, or groups of rows that stay together).
    """

    alpha: float = 0.5
    column: str = "label"
    min_units: int = 10

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.min_units < 1:
            raise ValueError("alpha must be above 0 and min_units at least 1")


@register(
    "partitioner",
    "dirichlet",
    params=DirichletParams,
    paper="Yurochkin et al. 2019, PFNM",
    url="https://arxiv.org/abs/1905.12022",
)
def dirichlet(params: DirichletParams, *, rows: Rows, clients: int, seed: int) -> list[Shard]:
    """Divide every label over clients in proportions drawn from Dirichlet(alpha).

    A unit of several rows counts once, under its most frequent label.

    Raises:
        DataError: The column is missing, there are fewer units than clients, or no draw gives every client enough.
    """
    from datasets import Dataset  # noqa: PLC0415  (seconds to import; only this method needs it)
    from flwr_datasets.partitioner import DirichletPartitioner  # noqa: PLC0415  (the same)

    labels = rows.columns.get(STRATUM) if params.column == "label" else None
    labels = values_of(rows, params.column) if labels is None else labels
    order = np.random.default_rng(seed).permutation
    parts = units(rows)
    need_units(parts, clients)
    parts = [parts[i] for i in order(len(parts))]
    frequent = [Counter(str(labels[i]) for i in unit).most_common(1)[0][0] for unit in parts]
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=params.alpha,
        min_partition_size=params.min_units,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict({"label": frequent, "unit": list(range(len(parts)))})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns at every draw it repeats
            dealt = [partitioner.load_partition(client)["unit"] for client in range(clients)]
    except ValueError:
        raise DataError(
            f"in ten draws with alpha {params.alpha} some client always got fewer than {params.min_units} units",
            where="data.partition",
            mend="Raise alpha, or lower min_units or data.clients.",
        ) from None
    return numbered([sorted(i for unit in units_of for i in parts[unit]) for units_of in dealt])
