"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from molehill.errors import AnswerError

Array = np.ndarray[Any, Any]


def check_finite(logits: Array | np.floating[Any]) -> None:
    """Refuse what a model says when its numbers ran over.

    Raises:
        AnswerError: The logits are not numbers, or infinite.
    """
    if not np.isfinite(logits).all():
        mend = "Use another gate or expert, or another model."
        raise AnswerError("the model answers with numbers that are not finite", mend=mend)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Draw from this many likeliest tokens only; 0 for all.
        top_p: Draw from the fewest likeliest tokens whose probabilities add up to this, after ``top_k``.
        seed: Equal seeds draw equal tokens; None draws anew each time.

    Raises:
        AnswerError: A number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("a temperature", self.temperature, int | float), ("top-p", self.top_p, int | float),
            ("top-k", self.top_k, int), ("a seed", 0 if self.seed is None else self.seed, int),
        ):  # fmt: skip
            if not isinstance(value, kinds):
                raise AnswerError(f"{name} must be a number, not {value!r:.40}")
        if not 0 <= self.temperature < float("inf"):
            raise AnswerError("temperature must be 0 or more", mend="0 takes the likeliest token each time.")
        if self.top_k < 0:
            raise AnswerError("top-k must be 0 or more", mend="0 draws from all tokens.")
        if not 0 < self.top_p <= 1:
            raise AnswerError("top-p must be above 0 and at most 1", mend="1 draws from all tokens.")
        if self.seed is not None and self.seed < 0:
            raise AnswerError("a seed must be 0 or more")


class Sampler:
    """Draws tokens; every answer has one of its own.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._how = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: Array) -> int:
        """Return the next token, given logits ``[vocabulary]``.

        Raises:
            AnswerError: The logits are not numbers.
        """
        best = int(logits.argmax())  # NaN counts as largest
        check_finite(logits[best])
        if self._how.temperature == 0:
            return best
        tokens, probabilities = self.distribution(logits)
        sums = np.cumsum(probabilities)
        return int(tokens[np.searchsorted(sums, self._random.random() * sums[-1], side="right")])

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Tokens that may be drawn, the likeliest first, and their probabilities.

        Args:
            logits: ``[vocabulary]``; the temperature must be above 0.
        """
        k = self._how.top_k
        if 0 < k < logits.size:
            tokens = np.argpartition(-logits, k - 1)[:k]
            tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        else:
            tokens = np.argsort(-logits, kind="stable")
        kept = logits[tokens].astype(np.float64)
        # A tiny temperature may overflow to -inf, which is a probability of 0.
        with np.errstate(over="ignore"):
            weights = np.exp((kept - kept[0]) / self._how.temperature)
        weights /= weights.sum()
        if self._how.top_p < 1:
            enough = int(np.searchsorted(np.cumsum(weights), self._how.top_p)) + 1
            tokens, weights = tokens[:enough], weights[:enough] / weights[:enough].sum()
        return tokens, weights
