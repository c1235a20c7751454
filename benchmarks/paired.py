"""Means over owners and seeds, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.tasks.outcomes import Parts

DRAWS = 2000
Scores: TypeAlias = Mapping[tuple[int, str], tuple[Parts, NDArray[np.int64]]]
"""What held-out rows were scored, with the units of the rows, by seed and owner."""


class Difference(NamedTuple):
    """How much better one side is.

    Attributes:
        mean: Over owners and seeds.
        low: Lower end of its 95% interval.
        high: Upper end.
        worst: Of the owner who loses most, who may be another with every seed; mean over seeds.
        losers: Owners whose own interval lies below 0.
        owners: How many there are; of every seed where these are not the same.
    """

    mean: float
    low: float
    high: float
    worst: float
    losers: int
    owners: int


def means(found: Scores, *, lower: bool = False) -> tuple[float, float]:
    """Mean over owners and seeds, and the mean over seeds of the worst owner.

    Args:
        found: The scores.
        lower: Whether less is better.
    """
    values: dict[int, list[float]] = {}
    for (seed, _), (parts, _) in found.items():
        values.setdefault(seed, []).append(parts.value())
    worst = max if lower else min
    return float(np.mean([np.mean(each) for each in values.values()])), float(
        np.mean([worst(each) for each in values.values()])
    )


def differences(ours: Scores, theirs: Scores, seed: int = 0, *, same_owners: bool = True) -> Difference:
    """Compare two sides, of the same rows.

    A paired bootstrap draws seeds, and within them the units of every owner's rows, the same for both sides.

    Args:
        ours: One side.
        theirs: The other.
        seed: Of the draws.
        same_owners: Whether an owner of a name is the same with every seed, so that its seeds count together.

    Raises:
        ValueError: They are of other rows.
    """
    rng = np.random.default_rng(seed)
    seeds, owners = (sorted({key[at] for key in ours}) for at in range(2))
    drawn = {key: _draws(*ours[key], *theirs[key], key, rng) for key in sorted(ours)}
    each = {key: ours[key][0].value() - theirs[key][0].value() for key in ours}
    picked = rng.integers(len(seeds), size=(DRAWS, len(seeds)))

    def over_seeds(by_seed: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.take_along_axis(np.stack(by_seed, 1), picked, 1).mean(1)

    of = {at: [key for key in ours if key[0] == at] for at in seeds}
    low, high = np.quantile(over_seeds([np.mean([drawn[key] for key in of[at]], 0) for at in seeds]), (0.025, 0.975))
    # Of one owner the seeds are too few to be drawn, and its rows differ from seed to seed.
    own = list(drawn.values())
    if same_owners:
        own = [np.mean([drawn[at, owner] for at in seeds if (at, owner) in drawn], 0) for owner in owners]
    losers = sum(bool(np.quantile(each, 0.975) < 0) for each in own)
    return Difference(
        float(np.mean([np.mean([each[key] for key in of[at]]) for at in seeds])),
        float(low),
        float(high),
        float(np.mean([min(each[key] for key in of[at]) for at in seeds])),
        losers,
        len(own),
    )


def _draws(
    mine: Parts,
    units: NDArray[np.int64],
    other: Parts,
    same: NDArray[np.int64],
    key: tuple[int, str],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Differences of one owner's rows, their units drawn anew."""
    if not np.array_equal(units, same):
        raise ValueError(f"{key[1]} of seed {key[0]} has other rows")
    names, place = np.unique(units, return_inverse=True)
    found = np.empty(DRAWS)
    for draw in range(DRAWS):
        weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[place].astype(float)
        found[draw] = mine.value(weights) - other.value(weights)
    return found
