"""How the numbers that a model says of texts are read, by the kind of its task. numpy only: devices import it.

Shapes: N texts, C numbers that a model says of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import numpy as np

from molehill.decoding.interfaces import log_softmax
from molehill.entities import Tagging, begins
from molehill.errors import AnswerError, DataError
from molehill.predictions import Class, Entities, Entity, Flags, Number, Prediction
from molehill.rowfiles.values import label_of, names_of, number_of

Array: TypeAlias = np.ndarray[Any, Any]

_ALIKE = 0.2  # two numbers are as good as one: a tenth of the range, which what 4 bits change of sound models is below


@dataclass(frozen=True)
class About:
    """What the numbers of a model are about.

    Attributes:
        labels: Names of the classes, in the order of the numbers; empty where there are none.
        range: The numbers that -1 and 1 stand for; None where there are none.
    """

    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Shown:
    """Where the tokens of a text are in it.

    Attributes:
        text: The text.
        places: First character, and one past the last, of every token.
        words: Which word of the tokenizer's own every token is in; None for special tokens.
    """

    text: str
    places: Sequence[tuple[int, int]]
    words: Sequence[int | None]


class Reading(ABC):
    """How the numbers that a model says of texts are read.

    Attributes:
        writes: They are of the next token; else of the text.
        several: They are of one of several classes, so that strategies may combine what experts say.
        by_token: They are of every token of a text, and the first token of a word speaks for it.
        fits: A gate can be fitted to rows on a device.
        figure: What is measured on labelled rows, which ``counts`` and ``figure_of`` compute; empty for accuracy.
        column: Where rows have what it should say; empty where they need not.
    """

    writes: ClassVar[bool] = False
    several: ClassVar[bool] = False
    by_token: ClassVar[bool] = False
    fits: ClassVar[bool] = True
    figure: ClassVar[str] = ""
    column: ClassVar[str] = "label"

    @abstractmethod
    def read(self, logits: Array, about: About, shown: Shown | None = None) -> Prediction:
        """What the numbers of one text say.

        Args:
            logits: ``[C]``, or of every token ``[T, C]``.
            about: What they are about.
            shown: Where the tokens are in the text, for numbers of tokens.
        """

    @abstractmethod
    def outputs(self, about: About) -> int:
        """C."""

    @abstractmethod
    def target(self, value: Any, about: About, where: str) -> Any:
        """What a model should say, by the label of a row: a class's place, a number, or 1 and 0 for every class.

        Raises:
            DataError: The label is none of this kind.
        """

    @abstractmethod
    def losses(self, logits: Array, targets: Array) -> Array:
        """Minus the log likelihood of targets ``[N]`` or ``[N, C]``, in nats, ``[N]``."""

    @abstractmethod
    def right(self, logits: Array, targets: Array) -> Array | None:
        """Whether each is right, ``[N]`` or ``[N, C]``; None where nothing is simply right or wrong."""

    @abstractmethod
    def alike(self, one: Array, two: Array) -> Array:
        """Whether two models ``[N, C]`` say the same, for every prediction."""

    @abstractmethod
    def lead(self, logits: Array) -> float:
        """How far ``[C]`` is from saying something else."""

    @abstractmethod
    def spread(self, mean: float, square: float) -> float:
        """What mean squared differences are measured by.

        Args:
            mean: Of the numbers that they are from.
            square: The mean of their squares.
        """

    @abstractmethod
    def counts(self, logits: Array, targets: Array) -> Array:
        """What ``figure_of`` is made of; of several batches they are added up."""

    @abstractmethod
    def figure_of(self, counts: Array, about: About) -> float:
        """The figure of labelled rows."""


class Choice(Reading):
    """One of several classes: their logits."""

    several = True

    def read(self, logits: Array, about: About, shown: Shown | None = None) -> Prediction:
        """See `Reading.read`."""
        del shown
        p = np.exp(log_softmax(logits))
        best = int(p.argmax())
        return Class(about.labels[best], float(p[best]), dict(zip(about.labels, p.tolist(), strict=True)))

    def outputs(self, about: About) -> int:
        """See `Reading.outputs`."""
        return len(about.labels)

    def target(self, value: Any, about: About, where: str) -> int:
        """See `Reading.target`.

        Raises:
            DataError: The label is none of the classes.
        """
        return _place(label_of(value, where), about, where)

    def losses(self, logits: Array, targets: Array) -> Array:
        """See `Reading.losses`."""
        p = np.exp(log_softmax(logits))[np.arange(len(targets)), targets]
        found: Array = -np.log(np.maximum(p, 1e-12))
        return found

    def right(self, logits: Array, targets: Array) -> Array:
        """See `Reading.right`."""
        found: Array = logits.argmax(-1) == targets
        return found

    def alike(self, one: Array, two: Array) -> Array:
        """See `Reading.alike`."""
        found: Array = one.argmax(-1) == two.argmax(-1)
        return found

    def lead(self, logits: Array) -> float:
        """See `Reading.lead`."""
        best = np.sort(logits)[-2:]
        return float(best[-1] - best[0])

    def spread(self, mean: float, square: float) -> float:
        """Their variance: what all have in common says nothing."""
        return square - mean**2

    def counts(self, logits: Array, targets: Array) -> Array:
        """How many are right, of how many."""
        right = self.right(logits, targets)
        return np.array([right.sum(), right.size], np.float64)

    def figure_of(self, counts: Array, about: About) -> float:
        """The share that is right."""
        del about
        return float(counts[0] / counts[1])


class NextToken(Choice):
    """The token that goes on."""

    writes = True
    column = ""


class Tags(Choice):
    """A tag for every word: the logits of its first token."""

    several = False
    by_token = True
    fits = False
    column = "tags"

    def read(self, logits: Array, about: About, shown: Shown | None = None) -> Entities:
        """See `Reading.read`."""
        assert shown is not None  # of tokens
        text, tagging = shown.text, Tagging.of(about.labels)
        firsts = begins(text, shown.places, shown.words)
        p = np.exp(log_softmax(logits[firsts]))
        tags = p.argmax(-1)
        ends = [_end(shown, range(*pair)) for pair in pairwise([*firsts, len(shown.places)])]
        found = []
        for first, stop, kind in tagging.spans(tags, np.arange(len(tags)) == 0).tolist():
            start, end = shown.places[firsts[first]][0], ends[stop - 1]
            start += len(text[start:end]) - len(text[start:end].lstrip())
            words = slice(first, stop)
            sure = float(p[words][np.arange(stop - first), tags[words]].min())
            found.append(Entity(text[start:end], tagging.types[kind], start, end, sure))
        return Entities(tuple(found))

    def target(self, value: Any, about: About, where: str) -> int:
        """A row has many.

        Raises:
            DataError: Always.
        """
        del value, about
        raise DataError("tags of words are not read here", where=where, mend="Leave them out.")


class Several(Reading):
    """Any number of classes: the log odds of each."""

    figure = "micro_f1"
    column = "labels"

    def read(self, logits: Array, about: About, shown: Shown | None = None) -> Flags:
        """See `Reading.read`."""
        del shown
        p = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500)))
        found = tuple(label for label, there in zip(about.labels, logits >= 0, strict=True) if there)
        return Flags(found, dict(zip(about.labels, p.tolist(), strict=True)))

    def outputs(self, about: About) -> int:
        """See `Reading.outputs`."""
        return len(about.labels)

    def target(self, value: Any, about: About, where: str) -> list[float]:
        """See `Reading.target`.

        Raises:
            DataError: A label is none of the classes.
        """
        there = {_place(name, about, where) for name in names_of(value, where)}
        return [float(place in there) for place in range(len(about.labels))]

    def losses(self, logits: Array, targets: Array) -> Array:
        """The mean over the classes."""
        wide = logits.astype(np.float64)
        found: Array = (np.logaddexp(0, wide) - targets * wide).mean(-1)
        return found

    def right(self, logits: Array, targets: Array) -> Array:
        """See `Reading.right`."""
        found: Array = (logits >= 0) == (targets > 0)
        return found

    def alike(self, one: Array, two: Array) -> Array:
        """See `Reading.alike`."""
        found: Array = (one >= 0) == (two >= 0)
        return found.ravel()

    def lead(self, logits: Array) -> float:
        """See `Reading.lead`."""
        return float(np.abs(logits).min())

    def spread(self, mean: float, square: float) -> float:
        """Their mean square: at 0 a class is as likely there as not."""
        del mean
        return square

    def counts(self, logits: Array, targets: Array) -> Array:
        """How many classes are rightly said to be there, and how many are said or should be, both added up."""
        said, there = logits >= 0, targets > 0
        return np.array([(said & there).sum(), said.sum() + there.sum()], np.float64)

    def figure_of(self, counts: Array, about: About) -> float:
        """F1 of all classes together; 1 where none is there and none is said."""
        del about
        return float(2 * counts[0] / counts[1]) if counts[1] else 1.0


class Amount(Reading):
    """A number: where it lies in its range, from -1 to 1."""

    figure = "rmse"

    def read(self, logits: Array, about: About, shown: Shown | None = None) -> Number:
        """See `Reading.read`."""
        del shown
        middle, half = _scale(about)
        return Number(middle + half * float(logits[0]))

    def outputs(self, about: About) -> int:
        """See `Reading.outputs`; none without a range."""
        return 0 if about.range is None else 1

    def target(self, value: Any, about: About, where: str) -> float:
        """See `Reading.target`.

        Raises:
            DataError: The label is no number.
        """
        middle, half = _scale(about)
        return (number_of(value, where) - middle) / half

    def losses(self, logits: Array, targets: Array) -> Array:
        """Half the squared error."""
        found: Array = np.square(logits[:, 0].astype(np.float64) - targets) / 2
        return found

    def right(self, logits: Array, targets: Array) -> None:
        """A number is near or far."""

    def alike(self, one: Array, two: Array) -> Array:
        """Whether they are within a tenth of the range."""
        found: Array = np.abs(one - two)[..., 0] <= _ALIKE
        return found

    def lead(self, logits: Array) -> float:
        """Every number is as good as another."""
        del logits
        return 0.0

    def spread(self, mean: float, square: float) -> float:
        """The variance of numbers that lie evenly in the range: those of a few texts may be all the same."""
        del mean, square
        return 1 / 3

    def counts(self, logits: Array, targets: Array) -> Array:
        """The squared errors added up, and how many they are."""
        errors = logits[:, 0].astype(np.float64) - targets
        return np.array([errors @ errors, len(errors)])

    def figure_of(self, counts: Array, about: About) -> float:
        """The root mean squared error in the unit of the labels."""
        return math.sqrt(counts[0] / counts[1]) * _scale(about)[1]


# By what devices call a model, see `molehill.tasks.kind.Kind.bundle`.
READINGS: Mapping[str, Reading] = {
    "classification": Choice(),
    "causal-lm": NextToken(),
    "regression": Amount(),
    "multi-label": Several(),
    "token-classification": Tags(),
}


def reading_of(kind: str) -> Reading:
    """How the numbers of a model are read.

    Args:
        kind: What devices call it.

    Raises:
        AnswerError: Nothing reads those of this kind.
    """
    if kind not in READINGS:
        raise AnswerError(f"nothing reads yet what a model for {kind} says", mend=f"Ask one for {', '.join(READINGS)}.")
    return READINGS[kind]


def _end(shown: Shown, tokens: Iterable[int]) -> int:
    """One past the last character that some tokens show, space after it left out."""
    end = max(shown.places[at][1] for at in tokens if shown.words[at] is not None)
    return len(shown.text[:end].rstrip())


def _scale(about: About) -> tuple[float, float]:
    """The middle of a range, and half its width."""
    low, high = about.range or (-1.0, 1.0)
    return (low + high) / 2, (high - low) / 2


def _place(label: str, about: About, where: str) -> int:
    if label not in about.labels:
        raise DataError(f"no label {label!r}", where=where, mend=f"There are: {', '.join(about.labels)}.")
    return about.labels.index(label)
