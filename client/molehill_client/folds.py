"""An owner's training rows in parts, to try on some what was fitted to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PARTS = 5  # of numbers, which count as alike where they are in the same part of their range


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
    _, unit = np.unique(np.asarray(units, np.int64), return_inverse=True)
    n = int(unit.max(initial=-1)) + 1
    parts = min(most, n)
    if parts < 2:
        return np.zeros(len(unit), np.int64)
    held = np.zeros((n, 1 + strata.shape[1]))
    np.add.at(held, unit, np.hstack([np.ones((len(unit), 1)), strata]))
    held = held[:, held.sum(0) > 0]
    share = held.sum(0) / parts
    order = np.random.default_rng(seed).permutation(n)
    order = order[np.argsort(-held[order, 0], kind="stable")]
    there, dealt = np.zeros((parts, held.shape[1])), np.zeros(n, np.int64)
    for one in order:
        # How much further from its share each fold would be, in squares; an empty one is always the best.
        further = ((2 * (there - share) + held[one]) * held[one] / share).sum(1)
        dealt[one] = int(further.argmin())
        there[dealt[one]] += held[one]
    return dealt[unit]


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
