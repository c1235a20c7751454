"""What kind of text it is, and who is best at that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Example, Passes, Picker, Through, all_of, log_softmax
from molehill.decoding.judging import condition, conditions, likelihoods, named, place_of, require_rows

_STEPS = 500


@dataclass(frozen=True)
class ClassifierParams:
    """Parameters of `Classifier`.

    Attributes:
        level: Whether it tells the best expert of a text, or its subject, for which a table has the experts.
        column: The column of the rows that names the best expert of each; where a row has none, all are tried.
        subject: The column that names the subject.
        decay: How strongly the weights of the classifier are held down.
    """

    level: Literal["query", "subject"] = "query"
    column: str = "expert"
    subject: str = "subject"
    decay: Annotated[float, Ge(0)] = 1e-3


@register(
    "picker",
    "classifier",
    params=ClassifierParams,
    paper="Wang et al. 2024, Bench-CoE: a Framework for Collaboration of Experts from Benchmark",
    url="https://arxiv.org/abs/2412.04167",
    seeds=("S69",),
)
class Classifier(Picker):
    """A classifier of texts that learnt from a benchmark who is best: text by text, or subject by subject.

    Who is best at a row is in a column of it, or is the expert that gives its answer the highest probability, of equals
    the first. Query level: scores are log probabilities of being the best, those of experts that are never best are
    -inf. Subject level: the likeliest subject, and from a table the mean score of every expert on its rows. Logistic
    regression on the mean of the base's last states; the paper trains a BERT of its own.
    """

    on_device = False

    def __init__(self, params: ClassifierParams) -> None:
        self._params = params
        self._logistic: _Logistic | None = None
        self._table = np.zeros((0, 0))  # scores of experts by class of the classifier

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`.

        Raises:
            AnswerError: A row names an expert that there is not, has no subject, or has neither expert nor answer.
        """
        require_rows(examples)
        scores = self._scored(passes, examples, through)
        rows = conditions(passes, examples, through)
        if self._params.level == "subject":
            subjects = [named(example, self._params.subject) for example in examples]
            known, kinds = np.unique(subjects, return_inverse=True)
            self._table = np.stack([scores[kinds == kind].mean(0) for kind in range(len(known))])
        else:
            known, kinds = np.unique(scores.argmax(1), return_inverse=True)
            self._table = np.where(np.arange(len(passes.experts)) == known[:, None], 0.0, -np.inf)
        self._logistic = _Logistic(rows, kinds, len(known), self._params.decay)

    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """See `Picker.scores`."""
        assert self._logistic is not None
        told = self._logistic(condition(passes, prompt))
        subject = self._params.level == "subject"
        found: Array = self._table[int(told.argmax())] if subject else (told[:, None] + self._table).max(0)
        return found

    def _scored(self, passes: Passes, examples: Sequence[Example], through: Through) -> Array:
        """How good every expert is on every row, ``[N, E]``."""
        column, size = self._params.column, len(passes.experts)
        found = np.zeros((len(examples), size))
        tried = [row for row, example in enumerate(examples) if column not in example.columns]
        if tried:
            found[tried] = likelihoods(passes, [examples[row] for row in tried], through)
        for row in sorted(set(range(len(examples))) - set(tried)):
            found[row, place_of(passes, examples[row], column)] = 1.0
        return found


class _Logistic:
    """Multinomial logistic regression, fitted by Nesterov's method.

    Args:
        rows: ``[N, d]``.
        kinds: The class of each.
        classes: How many there are.
        decay: Half of it times the squared weights is added to the mean loss.
    """

    def __init__(self, rows: Array, kinds: Array, classes: int, decay: float) -> None:
        self._mean = rows.mean(0)
        spread = rows.std(0)
        self._scale = np.where(spread > 0, spread, 1.0)
        x = np.concatenate([(rows - self._mean) / self._scale, np.ones((len(rows), 1))], 1)
        wanted = np.eye(classes)[kinds]
        held = np.append(np.full(rows.shape[1], decay), 0.0)[:, None]  # the bias is free
        # the steepest that the mean of the losses can curve: half of the largest eigenvalue
        step = 1 / (np.linalg.norm(x, 2) ** 2 / (2 * len(x)) + decay)
        weights = ahead = np.zeros((x.shape[1], classes))
        for t in range(_STEPS):
            slope = x.T @ (np.exp(log_softmax(x @ ahead)) - wanted) / len(x) + held * ahead
            before, weights = weights, ahead - step * slope
            ahead = weights + t / (t + 3) * (weights - before)
        self._weights = weights

    def __call__(self, row: Array) -> Array:
        """Log probabilities of the classes for one row ``[d]``."""
        return log_softmax(np.append((row - self._mean) / self._scale, 1.0) @ self._weights)
