"""The experts of the domain that a text is nearest to, by what they do to rows like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Example, Passes, Picker, Through, all_of
from molehill.decoding.judging import condition, conditions, cosines, likelihoods, place_of, require_rows


@dataclass(frozen=True)
class CentroidParams:
    """Parameters of `Centroid`.

    Attributes:
        column: The column of the rows that names the expert of their domain.
        score: How much the experts' scores on rows like the text count beside the similarity; 0 for not at all.
        sample: On how many rows, those most like the text, they are scored.
    """

    column: str = "expert"
    score: Annotated[float, Ge(0)] = 1.0
    sample: Annotated[int, Ge(1)] = 10


@register(
    "picker",
    "centroid",
    params=CentroidParams,
    paper="Ding et al. 2025, Selecting and Merging: Towards Adaptable and Scalable Named Entity Recognition with LLMs",
    url="https://arxiv.org/abs/2506.22813",
    seeds=("S19",),
)
class Centroid(Picker):
    """Cosine of a text and the mean of each expert's rows, plus its score on rows like it; those chosen become one.

    A text is what its states are in the base alone. The score is the probability of a row's answer, the geometric mean
    over its tokens; an expert is asked about a row when a text first comes near it. An expert whose column names no row
    is never picked. The paper merges the best of either ranking into a model of its own for a whole domain; here both
    are summed, and every text has its own merge: the mean of the chosen.
    """

    on_device = False
    weigh = "mean"

    def __init__(self, params: CentroidParams) -> None:
        self._params = params
        self._examples: list[Example] = []
        self._rows: Array = np.zeros((0, 0))
        self._means = self._known = self._likely = self._rows

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`.

        Raises:
            AnswerError: A row names no expert.
        """
        require_rows(examples)
        places = np.array([place_of(passes, example, self._params.column) for example in examples])
        self._examples, self._rows = list(examples), conditions(passes, examples, through)
        self._known = np.full(len(examples), fill_value=False)
        self._likely = np.zeros((len(examples), len(passes.experts)))
        self._means = np.full((len(passes.experts), self._rows.shape[1]), np.nan)
        for place in set(places.tolist()):
            self._means[place] = self._rows[places == place].mean(0)

    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """See `Picker.scores`.

        Raises:
            AnswerError: A row has no answer to score experts by.
        """
        text = condition(passes, prompt)
        found = cosines(self._means, text)
        if self._params.score:
            near = np.argsort(-cosines(self._rows, text), kind="stable")[: self._params.sample]
            fresh = [int(row) for row in near if not self._known[row]]
            if fresh:
                self._likely[fresh] = likelihoods(passes, [self._examples[row] for row in fresh])
                self._known[fresh] = True
            found = found + self._params.score * self._likely[near].mean(0)
        return np.where(np.isnan(found), -np.inf, found)
