"""Deals the rows of a simulation to its clients and holds out each client's test rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molehill import config, files
from molehill.errors import DataError
from molehill.tasks.rows import DOMAIN, GROUP, STRATUM, TASK, Rows
from molehill.tasks.schema import load_rows
from molehill.tasks.units import Unit, set_aside, units
from molehill_simulation.shards import Shard


@dataclass(frozen=True)
class ClientRows:
    """What one client owns.

    Attributes:
        name: Name of the client.
        train: Rows it trains on.
        test: Held-out rows that it is scored on; no client trains on them, nor on rows of the same group or content.
        owner: Who it is, as the data say; empty where they do not.
        spare: Held-out rows of the other split, which are left alone.
    """

    name: str
    train: Rows
    test: Rows
    owner: str = ""
    spare: Rows | None = None

    @property
    def renamed(self) -> bool:
        """Whether its name had to be another than the data say."""
        return bool(self.owner) and self.name not in {self.owner, f"{self.owner}-{self.name.rpartition('-')[2]}"}


def names_of(owners: Sequence[ClientRows]) -> dict[str, str]:
    """Who the clients are whose names had to be others than the data say: theirs by ours."""
    return {owner.name: owner.owner for owner in owners if owner.renamed}


def deal(data: config.Data, rows: Rows, seed: int, split: config.Split = "test") -> list[ClientRows]:
    """Partition rows over clients, set aside what is for validation, hold out test rows, then apply the caps.

    A unit (see `molehill.tasks.units.units`) is held out or trained on as a whole, on whichever clients its rows
    are. Labels are stratified as far as units allow. Equal arguments give equal rows, and what is set aside does not
    follow from the seed. Either split leaves the same rows to train on.

    Args:
        data: Number of clients, partitioner, held-out fractions and caps.
        rows: Checked rows.
        seed: Of everything random here.
        split: Which of the held-out rows clients are scored on.

    Returns:
        One entry per client, in the partitioner's order.

    Raises:
        DataError: There are fewer rows than clients, a client is left without training or held-out rows, or no folder
            can have its name.
    """
    if len(rows) < data.clients:
        raise DataError(
            f"there are {len(rows)} rows for {data.clients} clients",
            where=rows.source,
            mend="Lower data.clients, or give more rows.",
        )
    shards: list[Shard] = data.partition.build("partitioner", rows=rows, clients=data.clients, seed=seed)
    labels = [str(label) for label in rows.columns.get(STRATUM, rows.columns.get("label", ("",) * len(rows)))]
    aside = set_aside(rows, data.validation_fraction)
    unit_of = {i: number for number, unit in enumerate(units(rows)) for i in unit}
    held_out: dict[int, bool] = {}
    result = []
    for number, shard in enumerate(shards):
        files.require_name(shard.name, DataError)
        rng = np.random.default_rng([seed, number])
        inside: dict[int, Unit] = {}
        validation = [i for i in shard.indices if aside[i]]
        left = [i for i in shard.indices if not aside[i]]
        for i in left:
            inside.setdefault(unit_of[i], []).append(i)
        _hold_out(inside, labels, data.test_fraction, held_out, rng)
        test = [i for i in left if held_out[unit_of[i]]]
        train = [i for i in left if not held_out[unit_of[i]]]
        if not test or not train:
            raise DataError(
                f"client {shard.name!r} has {len(left)} rows in {len(inside)} units: none to "
                f"{'train on' if test else 'hold out'}",
                where="data.test_fraction",
                mend="Lower data.clients, change data.test_fraction or give more rows.",
            )
        if split == "validation" and not validation:
            raise DataError(
                f"client {shard.name!r} has {len(left)} rows, of which none is set aside for validation",
                where="data.validation_fraction",
                mend="Raise it, lower data.clients or give more rows.",
            )
        train = _sample(train, labels, data.rows, rng)
        parts = [rows.take(_sample(part, labels, data.test_rows, rng)) for part in (test, validation)]
        scored, spare = parts if split == "test" else reversed(parts)
        result.append(ClientRows(shard.name, rows.take(train), scored, shard.owner, spare))
    return result


def deal_to(run: config.Config, folders: Sequence[Path]) -> list[ClientRows]:
    """Deal the rows of a configuration to folders, as ``train.jsonl`` and ``test.jsonl``.

    What is set aside for validation is in neither of them, but in ``validation.jsonl`` where there is any. The files
    have the columns of the source, so the same configuration reads them.

    Args:
        run: The configuration; there are as many clients as folders, whatever it says.
        folders: Made when missing.

    Returns:
        The rows, in the order of the folders.

    Raises:
        DataError: The rows cannot be read or dealt, or a file cannot be written or is there already.
    """
    data = run.data.model_copy(update={"clients": len(folders)})
    owners = deal(data, load_rows(data, run.task)[0], run.run.seed)
    for folder, owner in zip(folders, owners, strict=True):
        assert owner.spare is not None  # it was dealt
        told = {"train.jsonl": owner.train, "test.jsonl": owner.test, "validation.jsonl": owner.spare}
        for name, rows in ((name, rows) for name, rows in told.items() if len(rows)):
            lines = [json.dumps(_as_read(record, data.columns), ensure_ascii=False) for _, record in rows.records()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                files.write(folder / name, "".join(f"{line}\n" for line in lines).encode(), replace=False)
            except FileExistsError as error:
                if not folder.is_dir():
                    raise DataError(f"cannot write it: {error.strerror}", where=str(folder)) from None
                raise DataError("there is a file already", where=str(folder / name), mend="Give new folders.") from None
            except OSError as error:
                raise DataError(f"cannot write it: {error.strerror}", where=str(folder / name)) from None
    return owners


def _as_read(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row under the names that its source has, without the columns that were made of others."""
    ours = {"group": GROUP, "task": TASK, "domain": DOMAIN}
    made = {STRATUM, *(name for each, name in ours.items() if each in columns)}
    return {columns.get(name, name): value for name, value in record.items() if name not in made}


def _hold_out(
    inside: dict[int, Unit],
    labels: Sequence[str],
    fraction: float,
    held_out: dict[int, bool],
    rng: np.random.Generator,
) -> None:
    """Decide for every unit of a client, in random order, whether it is held out.

    A unit is when that brings the held-out counts per label nearer to ``fraction`` of the client's rows. Units that
    another client has decided on already keep their side.
    """
    counts = {key: Counter(labels[i] for i in unit) for key, unit in inside.items()}
    want: dict[str, float] = defaultdict(float)  # rows still to hold out, per label
    for key, count in counts.items():
        for label, n in count.items():
            want[label] += fraction * n - n * held_out.get(key, False)
    undecided = [key for key in inside if key not in held_out]
    for key in rng.permutation(undecided).tolist():
        # |want|^2 - |want - count|^2, written out
        held_out[key] = sum(2 * want[label] * n - n * n for label, n in counts[key].items()) > 0
        if held_out[key]:
            for label, n in counts[key].items():
                want[label] -= n
    sides = {held_out[key] for key in inside}
    if len(sides) == 1 and undecided and len(inside) > 1:  # so few units that one side came out empty
        smallest = min(undecided, key=lambda key: len(inside[key]))
        held_out[smallest] = not held_out[smallest]


def _sample(indices: list[int], labels: Sequence[str], most: int | None, rng: np.random.Generator) -> list[int]:
    """At most ``most`` of ``indices``, with the labels in proportion (largest remainders)."""
    if most is None or len(indices) <= most:
        return indices
    by_label: dict[str, list[int]] = {}
    for i in rng.permutation(indices).tolist():
        by_label.setdefault(labels[i], []).append(i)
    quota: dict[str, Any] = {label: most * len(found) / len(indices) for label, found in by_label.items()}
    keep = {label: int(q) for label, q in quota.items()}
    for label in sorted(quota, key=lambda label: (keep[label] - quota[label], label))[: most - sum(keep.values())]:
        keep[label] += 1
    return sorted(i for label, found in by_label.items() for i in found[: keep[label]])
