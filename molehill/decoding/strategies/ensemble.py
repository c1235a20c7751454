"""Logits of all experts, each asked alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Gt

from molehill.catalogue import register
from molehill.decoding.interfaces import (
    OWN,
    Array,
    Conditions,
    Example,
    Passes,
    Scores,
    Strategy,
    Through,
    all_of,
    log_softmax,
)
from molehill.errors import AnswerError


@dataclass(frozen=True)
class EnsembleParams:
    """Parameters of `Ensemble`.

    Attributes:
        rows: File of rows that are like those that each expert is for; empty where all are to weigh alike.
        column: Column of the rows that names the expert.
        temperature: Divides the standardised similarities; towards 0 the most similar answers alone.
        own: Whether the model with its own gate is one of those that are asked.
    """

    rows: str = ""
    column: str = "expert"
    temperature: Annotated[float, Gt(0)] = 1.0
    own: bool = True


@dataclass(frozen=True)
class _Likeness:
    """What the rows say of who is asked: all M centroids of unit length, and how similar the rows are to each."""

    centroids: Array  # [M, d]
    mean: Array  # [M]
    spread: Array  # [M]

    def of(self, condition: Array) -> Array:
        """Standardised cosine to each centroid, ``[M]``; 0 where rows do not differ."""
        far = self.centroids @ _unit(condition) - self.mean
        return np.divide(far, self.spread, out=np.zeros_like(far), where=self.spread > 1e-9)  # type: ignore[no-any-return]  # numpy's arrays are Any


@register(
    "decoding",
    "ensemble",
    params=EnsembleParams,
    paper="Li et al. 2025, Ensembles of Low-Rank Expert Adapters",
    url="https://arxiv.org/abs/2502.00089",
    seeds=("S129",),
)
class Ensemble(Strategy):
    """The mean of logits of the model's own gate and of every expert alone, by how like its rows the prompt is.

    ``sum_m w_m z_m`` with ``w = softmax(cos' / temperature)``: the cosine of the prompt to the centroid of an
    expert's rows, less its mean over all rows and by their standard deviation. The own gate stands for the adapter
    that was trained on everything, and has the centroid of all rows. A pass and a cache for each, every token. Without
    rows all weigh alike. Differs: what a text is like is the mean of the base's last states, where the paper takes
    projected gradients; and experts are those of the run, where it trains one for each cluster of gradients.
    """

    routed = True

    def __init__(self, params: EnsembleParams) -> None:
        self._params = params
        self._likeness: _Likeness | None = None

    @property
    def rows(self) -> str:
        """See `Learns.rows`."""
        return self._params.rows

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`: conditions are of the prompts, without the answers.

        Raises:
            AnswerError: The passes cannot tell what a text is like, a row names no expert, or an expert has no rows.
        """
        where, column = self._params.rows, self._params.column
        if not isinstance(passes, Conditions):
            raise AnswerError("only a host can tell what a text is like", where=where, mend="Leave rows out.")
        places: dict[str, list[int]] = {name: [] for name in passes.experts}
        for place, row in enumerate(examples):
            name = row.columns.get(column)
            if name not in places:
                what = f"row {place + 1} has no column {column!r}" if name is None else f"there is no expert {name!r}"
                mend = f"Name one of {', '.join(places)} there, or say which column does: --set column=NAME"
                raise AnswerError(what, where=where, mend=mend)
            places[name].append(place)
        if lacks := [name for name, found in places.items() if not found]:
            raise AnswerError(f"no row is for the expert {lacks[0]}", where=where, mend="Add some, or leave rows out.")
        units = np.stack([_unit(passes.condition(row.ids)) for row in through(examples)])
        groups = [*([[*range(len(units))]] if self._params.own else []), *places.values()]
        centroids = np.stack([_unit(units[group].mean(0)) for group in groups])
        cosines = units @ centroids.T
        self._likeness = _Likeness(centroids, cosines.mean(0), cosines.std(0))

    def weights(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """How much the own gate (where it is asked) and every expert count, ``[M]``; they sum to 1.

        Args:
            passes: Of the model.
            prompt: Ids.
        """
        alike = np.zeros(self._params.own + len(passes.experts))
        if self._likeness is not None and isinstance(passes, Conditions):
            alike = self._likeness.of(passes.condition(prompt))
        found: Array = np.exp(log_softmax(alike / self._params.temperature))
        return found

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:
        """See `Strategy.begin`.

        Raises:
            AnswerError: A router lacks an expert.
        """
        lanes = [(OWN, "")] if self._params.own else []
        lanes += [(passes.only([name]), f"expert {name}") for name in passes.experts]
        weights = self.weights(passes, prompt)

        def scores(ids: Sequence[int]) -> Array:
            found = np.zeros(passes.answers)
            for weight, (setting, lane) in zip(weights, lanes, strict=True):
                if weight:
                    found += weight * passes.logits(ids, setting, lane)
            return found

        return scores


def _unit(vector: Array) -> Array:
    """A vector of length 1 in float64; one without a direction stays 0."""
    long = vector.astype(np.float64)
    found: Array = long / max(float(np.linalg.norm(long)), 1e-12)
    return found
