"""Rows to measure a run on: those that it held out, or those of a file."""

from __future__ import annotations

import logging
from pathlib import Path

from molehill.config import Data
from molehill.errors import DataError
from molehill.tasks.batches import Example
from molehill.tasks.kind import make_task
from molehill.tasks.schema import load_rows
from molehill_simulation.data import deal
from molehill_simulation.source import Source

_log = logging.getLogger(__name__)


def labelled(source: Source, gate: str, file: Path | None, most: int | None = None) -> list[Example]:
    """Encoded rows with labels or answers.

    Args:
        source: A run or an adapter.
        gate: Whose rows of the run, as for `Source.client`.
        file: Rows to take instead.
        most: At most so many, as many of each client; None for all.

    Returns:
        The rows; none when no file is given and those of the run are not on this machine.

    Raises:
        DataError: The file cannot be read, or a row does not fit.
    """
    task = make_task(source.task, source.tokenizer)
    if file is not None:
        rows, _ = load_rows(Data(source=str(file)), source.task)
        return list(task.encode(rows)[:most])
    if source.run is None or source.out is None or not (source.out / "clients").is_dir():
        return []
    try:
        rows, _ = load_rows(source.run.data, source.task)
    except DataError as error:
        _log.warning("nothing is measured, since the rows of the run are not here: %s", error)
        return []
    owners = deal(source.run.data, rows, source.run.run.seed, source.run.evaluate.split)
    chosen = [owner for owner in owners if source.client(gate) in {None, owner.name}]
    each = None if most is None else max(1, most // len(chosen))
    return [example for owner in chosen for example in task.encode(owner.test)[:each]]
