"""What is measured of every model, as kinds of tasks declare it: named, compared, and written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from molehill.intervals import Interval, of_bounded, standard_error
from molehill.words import amount, figure, nats

# Means over answers that were written, as people call them.
OF_ANSWERS = {
    "exact_match": "exact match",
    "normalised_match": "normalised match",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}

_LARGEST = 700.0  # a loss whose exponential is a number still


@dataclass(frozen=True)
class Measure:
    """Something that is measured of every model.

    Attributes:
        name: Its key in ``summary.json``.
        title: As people call it.
        short: The same in a few letters, beside a bar.
        of: Takes it from the scores of a stage; None where it is not there.
        within: Takes its interval from them.
        lower: Whether less is better.
        most: The most that it can be; None where there is no such number.
        least: The least that it can be; None where there is no such number.
        logarithmic: Whether it is averaged as its logarithm.
        write: A value as people read it.
        tabled: Whether tables have a column for it.
    """

    name: str
    title: str
    short: str
    of: Callable[[Mapping[str, Any]], float | None]
    within: Callable[[Mapping[str, Any]], Interval | None] = lambda scores: None  # noqa: ARG005  (of no measure)
    lower: bool = False
    most: float | None = 1.0
    least: float | None = 0.0
    logarithmic: bool = False
    write: Callable[[float | None], str] = figure
    tabled: bool = True

    def holds(self, value: float) -> bool:
        """Whether it can be so much."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def span(self) -> float | None:
        """The most that two values can differ by; None where there is no such number."""
        return None if self.least is None or self.most is None else self.most - self.least

    def spans(self, *differences: float) -> bool:
        """Whether two values can differ by as much."""
        return self.span is None or max(map(abs, differences)) <= self.span

    def ends(self, interval: Interval) -> tuple[str, ...]:
        """Both ends of an interval, short."""
        return tuple(text.removeprefix("0") if text.startswith("0.") else text for text in map(self.write, interval))

    @property
    def best(self) -> Callable[[Iterable[float]], float]:
        """Picks the best of several values."""
        return min if self.lower else max

    @property
    def worst(self) -> Callable[[Iterable[float]], float]:
        """Picks the worst of several values."""
        return max if self.lower else min


def _perplexity(loss: float | None) -> float | None:
    """Exponential of a loss in nats; None where that is more than a number can be."""
    return None if loss is None or loss > _LARGEST else math.exp(loss)


def _told(name: str) -> Callable[[Mapping[str, Any]], Interval | None]:
    """Takes an interval that the client has told."""

    def interval(scores: Mapping[str, Any]) -> Interval | None:
        found = scores.get(f"{name}_interval")
        return None if found is None else (found[0], found[1])

    return interval


def _perplexities(scores: Mapping[str, Any]) -> Interval | None:
    low, high = (_perplexity(end) for end in scores.get("loss_interval") or (None, None))
    return None if low is None or high is None else (low, high)


def _of_answers(name: str, scores: Mapping[str, Any]) -> Interval | None:
    """The interval of a mean over answers."""
    answers = scores.get("answers")
    if answers is None:
        return None
    n, total = answers["n"], answers[name]
    return of_bounded(min(1.0, total / n), standard_error(total, answers.get(f"{name}_squares", total), n), n)


def _answered(name: str, scores: Mapping[str, Any]) -> float | None:
    """A mean over the answers that were written; None where none were."""
    answers = scores.get("answers")
    return None if answers is None else answers[name] / answers["n"]


def figured(
    name: str, title: str, short: str = "", *, lower: bool = False, most: float | None = 1.0,
    least: float | None = 0.0, write: Callable[[float | None], str] = figure, tabled: bool = True,
) -> Measure:  # fmt: skip
    """A measure that a task's scores have under its own name, see `molehill.plan.Scores.figures`.

    Args:
        name: The name.
        title: As people call it.
        short: The same in a few letters.
        lower: Whether less is better.
        most: The most that it can be; None where there is no such number.
        least: The least that it can be; None where there is no such number.
        write: A value as people read it.
        tabled: Whether tables have a column for it.
    """

    def of(scores: Mapping[str, Any]) -> float | None:
        found = scores.get("figures", {}).get(name)
        return None if found is None else found["value"]

    def within(scores: Mapping[str, Any]) -> Interval | None:
        interval = scores.get("figures", {}).get(name, {}).get("interval")
        return None if interval is None else (interval[0], interval[1])

    return Measure(
        name, title, short or title, of, within, lower=lower, most=most, least=least, write=write, tabled=tabled
    )


LOSS = Measure(
    "loss",
    "loss",
    "loss",
    lambda scores: scores.get("loss"),
    _told("loss"),
    lower=True,
    most=None,
    write=nats,
    tabled=False,
)
ACCURACY = Measure("accuracy", "accuracy", "", lambda scores: scores.get("accuracy"), _told("accuracy"))
MACRO_F1 = Measure("macro_f1", "macro-F1", "F1", lambda scores: scores.get("macro_f1"), _told("macro_f1"))
TOKEN_ACCURACY = Measure(
    "token_accuracy", "token accuracy", "", lambda scores: scores.get("accuracy"), _told("accuracy")
)
PERPLEXITY = Measure(
    "perplexity",
    "perplexity",
    "ppl",
    lambda scores: _perplexity(scores.get("loss")),
    _perplexities,
    lower=True,
    most=None,
    logarithmic=True,
    write=amount,
)
ANSWERS = tuple(
    Measure(name, title, title, partial(_answered, name), partial(_of_answers, name), tabled=False)
    for name, title in OF_ANSWERS.items()
)
