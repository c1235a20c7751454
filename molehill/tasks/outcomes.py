"""What a model scored row by row, so that two models are compared on the same rows. Needs numpy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehill.intervals import of_mean, of_paired, standard_error, student
from molehill.plan import Figure
from molehill.tasks.measures import Measure

Array = NDArray[np.float64]
Places = NDArray[np.int64]

_MOST = 1e30  # what a `Figure` may be


@dataclass(frozen=True)
class Parts:
    """One measure as what every row adds to it: in each column what is above over what is below, and of these the mean.

    An accuracy has one column, with what is right above and what is predicted below; macro-F1 has one for each class,
    with what is right above, and half of what is there or said below. So below adds up to the number of predictions.

    Attributes:
        above: ``[M]``, one for each entry.
        below: ``[M]``, at least 0.
        rows: Row of each entry, ``[M]``.
        columns: Column of each entry, ``[M]``.
        root: Whether the measure is the square root of that mean.
    """

    above: Array
    below: Array
    rows: Places
    columns: Places
    root: bool = False

    @classmethod
    def of_rows(cls, above: Any, below: Any = None, *, root: bool = False) -> Parts:
        """Of one column, with an entry for each row.

        Args:
            above: ``[N]``.
            below: ``[N]``; 1 of every row when None.
            root: See the class.
        """
        above = np.asarray(above, np.float64)
        below = np.ones_like(above) if below is None else np.asarray(below, np.float64)
        return cls(above, below, np.arange(len(above)), np.zeros(len(above), np.int64), root)

    def value(self, weights: Array | None = None) -> float | None:
        """The measure; None where nothing is below in any column.

        Args:
            weights: How much every row counts, ``[N]``; all alike when None. A bootstrap counts how often it drew each.
        """
        ratios, occurs = self._ratios(np.ones(len(self.rows)) if weights is None else weights[self.rows])
        if not occurs.any():
            return None
        mean = float(ratios[occurs].mean())
        return math.sqrt(max(0.0, mean)) if self.root else mean

    def changes(self, n: int) -> Array:
        """By how much the measure changes with each of ``n`` rows (the delta method), ``[n]``; they add up to 0."""
        ratios, occurs = self._ratios(np.ones(len(self.rows)))
        below = _added(self.columns, self.below)
        scale = np.divide(1.0, below, out=np.zeros_like(below), where=occurs) / occurs.sum()
        each = (self.above - ratios[self.columns] * self.below) * scale[self.columns]
        if self.root:
            root = math.sqrt(max(0.0, float(ratios[occurs].mean())))
            each = each / (2 * root) if root else each
        return _added(self.rows, each, n)

    def _ratios(self, weights: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Above over below of every column, and in which of them anything is below."""
        above, below = (_added(self.columns, weights * part) for part in (self.above, self.below))
        occurs = below > 0
        return np.divide(above, below, out=np.zeros_like(above), where=occurs), occurs


@dataclass(frozen=True)
class Outcomes:
    """What a model scored on some rows.

    Attributes:
        n: Rows.
        parts: By the name of a measure of the task (`molehill.tasks.kind.Kind.measures`), its first among them where
            that means something.
    """

    n: int
    parts: Mapping[str, Parts]

    def placed(self, order: Sequence[int]) -> Outcomes:
        """The same where the rows were counted in another order.

        Args:
            order: Of every row, in the order they were counted in, its place.

        Raises:
            ValueError: Not as many rows were counted.
        """
        if len(order) != self.n:
            raise ValueError(f"{self.n} of {len(order)} rows were counted")
        places = np.asarray(order, np.int64)
        return Outcomes(self.n, {name: _sorted(part, places[part.rows]) for name, part in self.parts.items()})

    def as_json(self) -> dict[str, Any]:
        """For a file; `of_json` reads it."""
        parts = {
            name: {
                "above": part.above.tolist(),
                "below": part.below.tolist(),
                "rows": part.rows.tolist(),
                "columns": part.columns.tolist(),
                "root": part.root,
            }
            for name, part in self.parts.items()
        }
        return {"n": self.n, "parts": parts}

    @classmethod
    def of_json(cls, found: Any) -> Outcomes:
        """What `as_json` wrote.

        Raises:
            ValueError: It is something else.
            LookupError: It lacks something.
            TypeError: It is of another form.
        """
        n, parts = int(found["n"]), {}
        for name, part in found["parts"].items():
            above, below = (np.array(part[key], np.float64) for key in ("above", "below"))
            rows, columns = (np.array(part[key], np.int64) for key in ("rows", "columns"))
            if not above.shape == below.shape == rows.shape == columns.shape or above.ndim != 1:
                raise ValueError(f"the entries of {name} are not of one number")
            if len(rows) and not (rows.min() >= 0 and rows.max() < n and columns.min() >= 0):
                raise ValueError(f"{name} has an entry of no row")
            parts[str(name)] = Parts(above, below, rows, columns, bool(part["root"]))
        return cls(n, parts)


def _sorted(part: Parts, rows: Places) -> Parts:
    """The entries in the order of other rows."""
    order = np.argsort(rows, kind="stable")
    return Parts(part.above[order], part.below[order], rows[order], part.columns[order], part.root)


def gains(
    alone: Outcomes, ours: Outcomes, measures: Sequence[Measure], units: Sequence[int] | None = None
) -> dict[str, Figure]:
    """How much better one model is than another on the same rows, with a 95% interval of the difference.

    Differences are of pairs: what both models get right, or wrong, says nothing. Of measures with a least and a most
    the interval is that of Bonett and Price (2012), of others that of the normal distribution; it is longer where there
    are few units of several predictions. Two models that say the same of every row differ by nothing, for certain.

    Args:
        alone: What the one scored.
        ours: What the other scored on the same rows in the same order.
        measures: What is measured.
        units: Of every row the number of the unit it is of, ``[N]``: only units are independent. Each row is one when
            None.

    Returns:
        By measure that both were scored by: above 0 where ``ours`` is better, be that more or less of it. What is more
        than a figure can be is left out.
    """
    n = ours.n
    _, places = np.unique(np.arange(n) if units is None else np.asarray(units, np.int64), return_inverse=True)
    same = all(_same(alone.parts.get(name), part) for name, part in ours.parts.items())
    found = {}
    for measure in measures:
        pair = alone.parts.get(measure.name), ours.parts.get(measure.name)
        if pair[0] is None or pair[1] is None:
            continue
        before, after = (part.value() for part in pair if part is not None)
        if before is None or after is None:
            continue
        sign = -1.0 if measure.lower else 1.0
        gain = sign * (after - before) + 0.0  # no -0
        each = _added(places, sign * (pair[1].changes(n) - pair[0].changes(n)))
        told = (gain, gain) if same else _within(gain, each, float(pair[1].below.sum()), measure)
        if max(map(abs, (gain, *(told or ())))) <= _MOST:
            found[measure.name] = Figure(value=gain, interval=told)
    return found


def _added(places: Places, values: Array, n: int = 0) -> Array:
    """The sum of the values of every place, of ``n`` or more."""
    return np.bincount(places, values, minlength=n).astype(np.float64)


def _same(one: Parts | None, other: Parts) -> bool:
    pairs = ("above", "below", "rows", "columns")
    return one is not None and all(np.array_equal(getattr(one, key), getattr(other, key)) for key in pairs)


def _within(gain: float, changes: Array, predictions: float, measure: Measure) -> tuple[float, float] | None:
    """The interval of a gain.

    Args:
        gain: It.
        changes: By how much it changes with each unit.
        predictions: Of all units.
        measure: Of what it is.
    """
    n = len(changes)
    values = gain + n * changes  # of every unit; their mean is the gain
    error = standard_error(n * gain, float(values @ values), n)
    if error is None:
        return None
    if measure.span is None:
        return of_mean(gain, error * student(n), low=-math.inf)
    squares = float(values @ values)
    if n != predictions:  # their deviation has to be guessed from them
        squares = n * gain**2 + n**2 * (error * student(n)) ** 2
    return of_paired(n * gain, squares, n, n / predictions, measure.span)
