"""How good every expert is alone: on the rows that somebody gives, and by what a text is like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molehill.decoding.interfaces import OWN, Array, Conditions, Example, Passes, Setting, Through, all_of, log_softmax
from molehill.errors import AnswerError

_LANE = "judged"


def alone(passes: Passes) -> list[Setting]:
    """The setting of every expert by itself.

    Raises:
        AnswerError: A router lacks one.
    """
    return [passes.only([name]) for name in passes.experts]


def loss(passes: Passes, example: Example, setting: Setting = OWN) -> float:
    """Minus the mean log probability of a row's answer, or that of its class.

    Args:
        passes: Of the model.
        example: The row.
        setting: Who answers.

    Raises:
        AnswerError: The row has no answer.
    """
    require_answer(example)
    if not passes.writes:
        return float(-log_softmax(passes.logits(example.ids, setting, _LANE))[example.answer[0]])
    found = passes.losses([*example.ids, *example.answer], setting)
    return float(found[-len(example.answer) :].mean())


def right(passes: Passes, example: Example, setting: Setting = OWN) -> bool:
    """Whether the likeliest class, or all likeliest tokens one after another, are a row's answer.

    Args:
        passes: Of the model.
        example: The row.
        setting: Who answers.

    Raises:
        AnswerError: The row has no answer.
    """
    require_answer(example)
    return all(
        int(passes.logits([*example.ids, *example.answer[:at]], setting, _LANE).argmax()) == token
        for at, token in enumerate(example.answer)
    )


def likelihoods(passes: Passes, examples: Sequence[Example], through: Through = all_of) -> Array:
    """The geometric mean of the probabilities that every expert alone gives a row's answer, ``[N, E]``.

    Args:
        passes: Of the model.
        examples: The rows.
        through: As of `Learns.learn`.

    Raises:
        AnswerError: A row has no answer, or an expert cannot answer alone.
    """
    settings = alone(passes)
    return np.exp([[-loss(passes, example, setting) for setting in settings] for example in through(examples)])


def condition(passes: Passes, ids: Sequence[int]) -> Array:
    """What a text is like, float64 ``[d]``.

    Raises:
        AnswerError: The passes do not tell.
    """
    if not isinstance(passes, Conditions):
        raise AnswerError("what a text is like is known only where the model was trained", mend="Ask it there.")
    return passes.condition(ids).astype(np.float64)


def conditions(passes: Passes, examples: Sequence[Example], through: Through = all_of) -> Array:
    """What the texts of rows are like, float64 ``[N, d]``; see `condition`, and `Learns.learn`."""
    return np.stack([condition(passes, example.ids) for example in through(examples)])


def cosines(rows: Array, one: Array) -> Array:
    """The cosine of every row ``[N, d]`` and one vector ``[d]``; 0 where either is 0."""
    lengths = np.linalg.norm(rows, axis=-1) * np.linalg.norm(one)
    found: Array = (rows @ one) / np.where(lengths > 0, lengths, 1.0)
    return found


def place_of(passes: Passes, example: Example, column: str) -> int:
    """The place in `Passes.experts` of the expert that a row names in some column.

    Raises:
        AnswerError: It has no such column, or there is no such expert.
    """
    name = named(example, column)
    if name not in passes.experts:
        known = ", ".join(passes.experts)
        raise AnswerError(f"a row names the expert {name!r} in column {column!r}", mend=f"There are {known}.")
    return passes.experts.index(name)


def named(example: Example, column: str) -> str:
    """What a row says in some column.

    Raises:
        AnswerError: It has none.
    """
    if column not in example.columns:
        mend = f"It has {', '.join(example.columns) or 'no columns'}."
        raise AnswerError(f"a row has no column {column!r}", where="--set rows", mend=mend)
    return example.columns[column]


def require_rows(examples: Sequence[Example]) -> None:
    """Refuse no rows at all.

    Raises:
        AnswerError: There are none.
    """
    if not examples:
        raise AnswerError("there are no rows to learn from", where="--set rows", mend="Give a file with some.")


def require_answer(example: Example) -> None:
    """Refuse a row without an answer.

    Raises:
        AnswerError: It has none.
    """
    if not example.answer:
        raise AnswerError("a row has no answer to judge experts by", where="--set rows", mend="Give it a label or one.")
