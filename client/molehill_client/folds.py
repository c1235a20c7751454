"""An owner's training rows in parts, to try on some what was fitted to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from molehill.tasks.batches import IGNORE, Example

_PARTS = 5  # of numbers, which count as alike where they are in the same part of their range
_FEWEST = 10  # units: of fewer none is set aside


def folds(units: Sequence[int], strata: NDArray[np.float64], most: int, seed: int) -> NDArray[np.int64]:
    """Deal rows to folds: rows of one unit to the same, and every fold with as much of each stratum as units allow.

    The largest units are dealt first, each to the fold that then lies closest to its share of everything.

    Args:
        units: Of every row the number of its unit, ``[n]``.
        strata: How much of each stratum every row holds, ``[n, S]``, see `strata_of`.
        most: Folds, where there are so many units.
        seed: Decides what sizes and strata leave open.

    Returns:
        The fold of every row, ``[n]``, from 0; none is empty. All are 0 where there is one unit, or no row.
    """
    parts = min(most, len(set(units)))
    if parts < 2:
        return np.zeros(len(units), np.int64)
    return _deal(units, strata, np.full(parts, 1 / parts), seed)


def holdout(units: Sequence[int], strata: NDArray[np.float64], part: float, seed: int) -> NDArray[np.bool_]:
    """Choose rows to try on what is made of the others: whole units, with as much of each stratum as these allow.

    Args:
        units: Of every row the number of its unit, ``[n]``.
        strata: How much of each stratum every row holds, ``[n, S]``, see `strata_of`.
        part: How much of the rows, above 0 and below 1.
        seed: Decides what sizes and strata leave open.

    Returns:
        Whether each row is chosen, ``[n]``. None is where there are fewer than ten units, or where the others would
        have nothing left of a stratum.
    """
    nothing = np.zeros(len(units), np.bool_)
    if len(set(units)) < _FEWEST:
        return nothing
    chosen = _deal(units, strata, np.array([1 - part, part]), seed) == 1
    gone = (strata.sum(0) > 0) & (strata[~chosen].sum(0) == 0)
    return nothing if chosen.all() or gone.any() else chosen


def _deal(
    units: Sequence[int], strata: NDArray[np.float64], shares: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """The part of every row, ``[n]``, where each of the parts gets its share of everything, ``[P]``."""
    _, unit = np.unique(np.asarray(units, np.int64), return_inverse=True)
    n = int(unit.max()) + 1
    held = np.zeros((n, 1 + strata.shape[1]))
    np.add.at(held, unit, np.hstack([np.ones((len(unit), 1)), strata]))
    held = held[:, held.sum(0) > 0]
    share = shares[:, None] * held.sum(0)
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.argsort(-held[order, 0], kind="stable")]
    there, dealt = np.zeros((len(shares), held.shape[1])), np.zeros(n, np.int64)
    for one in order:
        # How much further from its share each part would be, in squares; of equal parts an empty one is the best.
        further = ((2 * (there - share) + held[one]) * held[one] / share).sum(1)
        dealt[one] = int(further.argmin())
        there[dealt[one]] += held[one]
    return dealt[unit]


def strata_of_rows(rows: Sequence[Example], head: Literal["row", "token"] | None) -> NDArray[np.float64]:
    """What encoded rows hold of each class, or of each part of the numbers, see `strata_of`.

    Args:
        rows: The rows.
        head: What has a label, see `molehill.tasks.kind.Kind`; of a task without a head all rows are alike.

    Returns:
        ``[n, S]``.
    """
    n = len(rows)
    if head is None or not n:
        return np.zeros((n, 0))
    if head == "row":
        return strata_of(np.array([row.labels for row in rows]), np.arange(n), n)
    of_tokens = [np.asarray(row.labels, np.int64) for row in rows]
    labels, places = np.concatenate(of_tokens), np.repeat(np.arange(n), list(map(len, of_tokens)))
    return strata_of(labels[labels != IGNORE], places[labels != IGNORE], n)


def strata_of(labels: NDArray[Any], rows: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """What every row holds that folds should have alike, for `folds`.

    Args:
        labels: Of every prediction its class (``[M]`` integers), its number (``[M]`` floats, told apart by fifths), or
            what there is of each class (``[M, C]``, not negative).
        rows: Row of every prediction, ``[M]``.
        n: Rows.

    Returns:
        ``[n, S]``.
    """
    if labels.ndim == 2:
        each = labels.astype(np.float64)
    else:
        if labels.dtype.kind == "f" and len(labels):
            labels = np.searchsorted(np.quantile(labels, np.arange(1, _PARTS) / _PARTS), labels)
        classes, place = np.unique(labels, return_inverse=True)
        each = np.eye(len(classes))[place]
    held = np.zeros((n, each.shape[1]))
    np.add.at(held, rows, each)
    return held
