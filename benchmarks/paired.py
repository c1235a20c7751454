"""Means over owners and seeds, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.tasks.outcomes import Parts

DRAWS = 2000
Scores: TypeAlias = Mapping[tuple[int, str], tuple[Parts, NDArray[np.int64]]]
"""What held-out rows were scored, with the units of the rows, by seed and owner."""


def means(found: Scores) -> tuple[float, float]:
    """Mean over owners and seeds, and the mean over seeds of the worst owner."""
    values: dict[int, list[float]] = {}
    for (seed, _), (parts, _) in found.items():
        values.setdefault(seed, []).append(parts.value())
    return float(np.mean([np.mean(each) for each in values.values()])), float(
        np.mean([min(v) for v in values.values()])
    )


def differences(ours: Scores, theirs: Scores, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean difference over owners and seeds and its 95% interval, and the greatest loss of an owner, mean over seeds.

    A paired bootstrap draws seeds, and within them the units of every owner's rows, the same for both sides.
    """
    rng, seeds = np.random.default_rng(seed), sorted({at for at, _ in ours})
    drawn = np.zeros((DRAWS, len(seeds)))
    each: dict[int, list[float]] = {at: [] for at in seeds}
    for (at, owner), (mine, units) in ours.items():
        other, same = theirs[at, owner]
        if not np.array_equal(units, same):
            raise ValueError(f"{owner} of seed {at} has other rows")
        each[at].append(mine.value() - other.value())
        names, place = np.unique(units, return_inverse=True)
        owners = sum(1 for a, _ in ours if a == at)
        for draw in range(DRAWS):
            weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[place].astype(float)
            drawn[draw, seeds.index(at)] += (mine.value(weights) - other.value(weights)) / owners
    picked = rng.integers(len(seeds), size=(DRAWS, len(seeds)))
    low, high = np.quantile(np.take_along_axis(drawn, picked, 1).mean(1), (0.025, 0.975))
    worst = float(np.mean([min(values) for values in each.values()]))
    return float(np.mean([np.mean(values) for values in each.values()])), float(low), float(high), worst
