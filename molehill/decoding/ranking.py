"""Which of several whole answers to one prompt is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from molehill.decoding.interfaces import OWN, Array, Passes, Setting
from molehill.decoding.sampling import check_finite
from molehill.errors import AnswerError

Rank: TypeAlias = Callable[[Passes, Sequence[int], Sequence[Sequence[int]], Setting], Array]


def likelihood(
    passes: Passes, prompt: Sequence[int], answers: Sequence[Sequence[int]], setting: Setting = OWN
) -> Array:
    """The mean log probability of the tokens of every answer, the one that ended it included, float64 ``[N]``.

    By the model's own logits, whatever strategy, temperature and limits drew it: one pass for each answer. The mean
    does not favour short answers, as the sum would.

    Args:
        passes: Of the model.
        prompt: Ids, at least one.
        answers: Ids of each, at least one.
        setting: Who answered.

    Raises:
        AnswerError: The model cannot do this setting.
    """
    return np.array([
        -passes.losses([*prompt, *answer], setting)[len(prompt) - 1 :].mean(dtype=np.float64) for answer in answers
    ])  # fmt: skip


RANKS: Mapping[str, Rank] = {"likelihood": likelihood}


def scores(
    by: str, passes: Passes, prompt: Sequence[int], answers: Sequence[Sequence[int]], setting: Setting = OWN
) -> list[float]:
    """How good whole answers to a prompt are; more is better.

    Args:
        by: Of `RANKS`.
        passes: Of the model.
        prompt: Ids.
        answers: Ids of each, as they were drawn.
        setting: Who answered.

    Raises:
        AnswerError: There is no such score, or the model answers with numbers that are not finite.
    """
    require(by)
    found = RANKS[by](passes, prompt, answers, setting)
    check_finite(found)
    return [float(score) for score in found]


def require(by: str) -> None:
    """Refuse a score that there is not.

    Raises:
        AnswerError: There is none of this name.
    """
    if by not in RANKS:
        raise AnswerError(f"answers have no score {by!r}", where="--rank-by", mend=f"There is {', '.join(RANKS)}.")
