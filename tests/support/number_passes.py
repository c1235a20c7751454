"""Passes of given numbers, for what must be exact: an expert is a function from a text to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from molehill.decoding.interfaces import OWN, Array, Setting

Says = Callable[[Sequence[int]], Any]


class NumberPasses:
    """A model with one router, in which the experts that may be chosen share alike. It tells no conditions.

    Args:
        says: Scores of the classes or of the next token ``[V]``, by expert.
        writes: Whether it is a causal LM.
    """

    def __init__(self, says: dict[str, Says], *, writes: bool = False) -> None:
        self.experts, self.size, self.writes = tuple(says), len(says), writes
        self.answers = len(next(iter(says.values()))([0, 0]))
        self._says = list(says.values())
        self.asked: list[tuple[str, ...]] = []  # the experts of every pass

    def only(self, experts: Iterable[str]) -> Setting:
        """See `Passes.only`."""
        return Setting(mask=tuple(name in set(experts) for name in self.experts))

    def logits(self, ids: Sequence[int], setting: Setting = OWN, lane: str = "") -> Array:
        """See `Passes.logits`."""
        share = np.array(setting.weights or setting.mask or [1.0] * self.size, float)
        self.asked.append(tuple(name for name, part in zip(self.experts, share, strict=True) if part))
        found = share @ np.array([says(ids) for says in self._says], float) / share.sum()
        return found.astype(np.float32)

    def losses(self, ids: Sequence[int], setting: Setting = OWN) -> Array:
        """See `Passes.losses`."""
        rows = [self.logits(ids[:n], setting).astype(float) for n in range(1, len(ids))]
        return np.array([np.log(np.exp(row).sum()) - row[token] for row, token in zip(rows, ids[1:], strict=True)])


class HostPasses(NumberPasses):
    """The same where a text is what its numbers are, and likeness is given.

    Args:
        says: As of `NumberPasses`.
        writes: As there.
        alike: ``[E, E]``.
    """

    def __init__(self, says: dict[str, Says], *, writes: bool = False, alike: Any = None) -> None:
        super().__init__(says, writes=writes)
        self.alike = np.eye(self.size) if alike is None else np.array(alike, float)

    def condition(self, ids: Sequence[int]) -> Array:
        """See `Conditions.condition`."""
        return np.array(ids, np.float32)

    def likeness(self) -> Array:
        """See `Likeness.likeness`."""
        return self.alike


def sure(token: int, answers: int, by: float = 4.0) -> Array:
    """Scores that prefer one token or class."""
    return by * np.eye(answers)[token]
