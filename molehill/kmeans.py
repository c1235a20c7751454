"""k-means, the same on every machine for the same points, number and seed."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.floating[Any]]

_STARTS, _STEPS = 8, 100


def kmeans(points: Points, k: int, seed: int) -> Points:
    """Centres with the least sum of squared distances that several starts led to (k-means++, then Lloyd's steps).

    Args:
        points: ``[N, d]``, at least one; finite, and so that sums of their squares are.
        k: How many.
        seed: Of the starts.

    Returns:
        ``[n, d]``, in the order of the first point that is nearest to each; n is below ``k`` where there are fewer
        different points.
    """
    tried = [_from(points, k, np.random.default_rng((seed, start))) for start in range(_STARTS if k > 1 else 1)]
    _, centres, labels = min(tried, key=lambda each: each[0])
    _, first = np.unique(labels, return_index=True)
    found: Points = centres[labels[np.sort(first)]]
    return found


def nearest(points: Points, centres: Points) -> NDArray[np.int64]:
    """Which of some centres ``[k, d]`` is nearest to each of some points ``[N, d]``; of equal ones the first."""
    found: NDArray[np.int64] = _apart(points, centres).argmin(1)
    return found


def _apart(points: Points, centres: Points) -> Points:
    """Squared distances, ``[N, k]``."""
    return np.stack([((points - centre) ** 2).sum(1) for centre in centres], 1)


def _from(points: Points, k: int, rng: np.random.Generator) -> tuple[float, Points, NDArray[np.int64]]:
    """The sum of squared distances, the centres and the centre of every point, from one start."""
    centres = points[[rng.integers(len(points))]]
    while len(centres) < k:
        chances = _apart(points, centres).min(1).astype(np.float64)
        if not chances.any():  # all points are centres
            break
        centres = np.concatenate([centres, points[[rng.choice(len(points), p=chances / chances.sum())]]])
    labels = nearest(points, centres)
    for _ in range(_STEPS):
        for c in np.unique(labels):  # one that lost all its points stays where it is
            centres[c] = points[labels == c].mean(0, dtype=np.float64)
        before, labels = labels, nearest(points, centres)
        if np.array_equal(before, labels):
            break
    return float(_apart(points, centres).min(1).sum(dtype=np.float64)), centres, labels
