"""The experts that answer a few labelled rows well, and differ from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import numpy as np
from annotated_types import Ge

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Example, Likeness, Passes, Picker, Through, all_of
from molehill.decoding.judging import alone, loss, require_rows, right
from molehill.errors import AnswerError

_GROUPS = 100_000  # that are looked at: a second
_MOST = 700.0  # beyond it the exponential is infinite
_DIGITS = 9  # that tell values apart


@dataclass(frozen=True)
class KShotParams:
    """Parameters of `KShot`.

    Attributes:
        pool: From how many of the best experts a group is taken.
    """

    pool: Annotated[int, Ge(1)] = 8


@register(
    "picker",
    "kshot",
    params=KShotParams,
    paper="Yang et al. 2024, Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
    url="https://arxiv.org/abs/2408.15915",
    seeds=("S72",),
)
class KShot(Picker):
    """Experts by their ranks in accuracy, perplexity and, as a group, diversity on a few labelled rows.

    The score of an expert is minus the sum of its ranks by accuracy and by perplexity of the answers, so that one that
    guesses right and is unsure falls behind. Of all groups in the pool of the best it takes that with the smallest sum
    of its members' ranks and its own rank by likeness (algorithm 1 of the paper). Likeness is the sum of absolute
    cosines over pairs and tensors, A and B apart, as in the authors' code; ranks start at 0, and equals have one. The
    paper has another model write reasons into the answers; here they are as the rows have them. The same experts
    answer every text.
    """

    on_device = False

    def __init__(self, params: KShotParams) -> None:
        self._pool = params.pool
        self._scores = np.zeros(0)
        self._alike: Array | None = None

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`.

        Raises:
            AnswerError: A row has no answer.
        """
        require_rows(examples)
        settings = alone(passes)
        told = [
            [(right(passes, example, setting), loss(passes, example, setting)) for setting in settings]
            for example in through(examples)
        ]
        accuracy, losses = np.moveaxis(np.array(told, float), -1, 0)  # [N, E] each
        perplexity = np.exp(np.minimum(losses, _MOST)).sum(0)
        self._scores = -(_ranks(-accuracy.sum(0)) + _ranks(perplexity))
        self._alike = passes.likeness() if isinstance(passes, Likeness) else None

    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:  # noqa: ARG002  (of the interface)
        """See `Picker.scores`."""
        return self._scores.astype(np.float64)

    def group(self, scores: Array, k: int) -> list[int]:
        """See `Picker.group`.

        Raises:
            AnswerError: There are too many groups, or nobody tells how alike the experts are.
        """
        pool = super().group(scores, max(k, self._pool))
        if k in {1, len(pool)}:
            return pool[:k]
        alike = self._alike
        if alike is None:
            raise AnswerError("how alike experts are is known only where they were trained", mend="Pick one of them.")
        if (many := math.comb(len(pool), k)) > _GROUPS:
            raise AnswerError(f"{len(pool)} experts have {many} groups of {k}", mend="Set a smaller pool.")
        groups = list(combinations(pool, k))
        likeness = np.array([sum(alike[pair] for pair in combinations(group, 2)) for group in groups])
        cost = _ranks(likeness) - np.array([scores[list(group)].sum() for group in groups])
        return list(groups[int(cost.argmin())])


def _ranks(values: Array) -> Array:
    """The place of every value among those that there are, the smallest at 0."""
    return np.unique(np.array([float(f"{value:.{_DIGITS}g}") for value in values]), return_inverse=True)[1]
