"""What a model says of a text: a class, labels, a number or entities, for programs and for people.

Devices import it (docs/adr/0006).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from molehill.characters import harmless


class Prediction(ABC):
    """What a model says of one text."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """The same for programs."""

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The same for people, as cells of a line."""


@dataclass(frozen=True)
class Class(Prediction):
    """One of several classes.

    Attributes:
        label: The likeliest.
        probability: Of that label.
        probabilities: Of all labels, in the order of the model's.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """See `Prediction.as_json`."""
        return {"label": self.label, "probability": self.probability, "probabilities": dict(self.probabilities)}

    @property
    def words(self) -> tuple[str, ...]:
        """See `Prediction.words`."""
        return harmless(self.label), f"{self.probability:6.1%}"


@dataclass(frozen=True)
class Flags(Prediction):
    """Any number of classes.

    Attributes:
        labels: Those that are likelier there than not, in the order of the model's.
        probabilities: Of all labels, each by itself.
    """

    labels: tuple[str, ...]
    probabilities: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """See `Prediction.as_json`."""
        return {"labels": list(self.labels), "probabilities": dict(self.probabilities)}

    @property
    def words(self) -> tuple[str, ...]:
        """See `Prediction.words`."""
        found = (f"{harmless(label)} {self.probabilities[label]:.1%}" for label in self.labels)
        return (", ".join(found) or "(none)",)


@dataclass(frozen=True)
class Number(Prediction):
    """A number.

    Attributes:
        value: In the unit of the labels.
    """

    value: float

    def as_json(self) -> dict[str, Any]:
        """See `Prediction.as_json`."""
        return {"value": self.value}

    @property
    def words(self) -> tuple[str, ...]:
        """See `Prediction.words`."""
        return (f"{self.value:.4g}",)


@dataclass(frozen=True)
class Entity:
    """An entity in a text.

    Attributes:
        text: Its words.
        type: Of its tags.
        start: Its first character in the text.
        end: One past its last.
        probability: Of the least likely of its tags.
    """

    text: str
    type: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class Entities(Prediction):
    """The entities of a text.

    Attributes:
        entities: In their order.
    """

    entities: tuple[Entity, ...]

    def as_json(self) -> dict[str, Any]:
        """See `Prediction.as_json`."""
        return {"entities": [asdict(each) for each in self.entities]}

    @property
    def words(self) -> tuple[str, ...]:
        """See `Prediction.words`."""
        return (", ".join(f"{harmless(each.text)} ({harmless(each.type)})" for each in self.entities) or "(none)",)


def lines(found: Sequence[Prediction]) -> list[str]:
    """Predictions for people, their cells one below the other."""
    cells = [each.words for each in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
