"""Which rows of a lab machine are trained on, and which are scored."""

from __future__ import annotations

import logging

from molehill.config import Config
from molehill.errors import DataError
from molehill.tasks.kind import kind_of
from molehill.tasks.rows import Rows
from molehill.tasks.units import lots, numbers, set_aside
from molehill.words import counted

_log = logging.getLogger("molehill_client.trainer")  # of the process that it is part of


def sides(rows: Rows, test: Rows | None, config: Config) -> tuple[Rows, Rows]:
    """Divide the rows of a machine, unit by unit.

    What is on which side follows from the rows alone, and rarely changes when a file grows. Rows that
    ``data.validation_fraction`` sets aside are neither trained on nor tests, in whichever file they are.

    Args:
        rows: Those of the owner.
        test: Those that the owner holds out; None holds out ``data.test_fraction``.
        config: The run.

    Returns:
        Rows to train on, and held-out rows of the split that the run is judged by.

    Raises:
        DataError: One of the two would be empty, or validation rows of both files do not go together.
    """
    data, split, given = config.data, config.evaluate.split, test is not None
    every = rows if test is None else Rows.joined([rows, test], rows.source)
    aside = set_aside(every, data.validation_fraction)
    if given:
        held = [i >= len(rows) for i in range(len(every))]
    else:
        held = [lot < data.test_fraction for lot in lots(every, "test")]
    places = [i for i in range(len(every)) if not aside[i]]
    train = rows.take([i for i in places if not held[i]])
    if split == "validation":
        scored = every.take([i for i in range(len(every)) if aside[i]])
        if test is not None:
            _require_alike(rows, test, config)
    elif test is None:
        scored = rows.take([i for i in places if held[i]])
    else:
        scored = test.take([i - len(rows) for i in places if held[i]])
    if not len(train) or not len(scored):
        raise DataError(
            f"of {counted(len(every), 'row')} there are {len(train)} to train on, {sum(held[i] for i in places)} for "
            f"tests and {sum(aside)} for validation, and the run is judged on those for {split}",
            where=rows.source,
            mend="Give more rows, or a file of held-out rows with --test.",
        )
    if any(aside):
        _log.info("%s of %d set aside for validation", counted(sum(aside), "row"), len(every))
    if given:
        _compare(every, [i for i in places if not held[i]], [i for i in places if held[i]])
    return train, scored


def _require_alike(rows: Rows, test: Rows, config: Config) -> None:
    """Refuse files whose rows cannot be scored together."""
    reads = kind_of(config.task).reads
    if {*reads(rows.columns)} != {*reads(test.columns)}:
        what = "the rows to train on and those held out have other columns, and both may have validation rows"
        raise DataError(what, where=test.source, mend="Give both files the same columns.")


def _compare(every: Rows, train: list[int], test: list[int]) -> None:
    """Say that two files have rows in common, or twins, or rows of one group: their owner divided them."""
    of = numbers(every)
    trained = {of[i] for i in train}
    if known := sum(of[i] in trained for i in test):
        _log.warning(
            "%s of %d held out have a row with the same text, or of the same group, among those that are trained on: "
            "scores will tell what was learnt by heart",
            counted(known, "row"),
            len(test),
        )
