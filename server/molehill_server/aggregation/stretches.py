"""Where the tensors of an update and those of the model lie side by side, so that many move in one operation."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molehill.errors import MessageError
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Layout
from molehill_server.aggregation.interfaces import Weight
from molehill_server.records import Pair


class Block(NamedTuple):
    """Parts of equal size that lie one after the other in both flat vectors.

    Attributes:
        theirs: Of the update's vector.
        ours: Of the model's vector.
        steps: The step that each part takes, ``[parts]``.
    """

    theirs: slice
    ours: slice
    steps: NDArray[np.float64]


class Stretches:
    """How the tensors of one layout lie in another one.

    Args:
        theirs: Layout of updates.
        ours: Layout of the model.
        client: Who sent the first of them, for the message.

    Raises:
        MessageError: An update holds a tensor the model does not have.
    """

    def __init__(self, theirs: Layout, ours: Layout, client: str) -> None:
        for key in theirs:
            if key not in ours:
                raise MessageError(f"the model has no tensor {key.name}", where=client)
        self.keys = list(theirs)
        place = {key: number for number, key in enumerate(ours)}
        self.index = np.array([place[key] for key in self.keys], np.intp)  # [K], the place among the model's tensors
        self.rows = np.array([theirs[key][0] if key.role == "A" else 0 for key in self.keys], np.intp)  # of A
        self.fits = np.array([theirs[key] == ours[key] for key in self.keys], bool)
        self._theirs = np.array([theirs.offsets[key] for key in self.keys], np.intp)
        self._ours = np.array([ours.offsets[key] for key in self.keys], np.intp)
        self._sizes = np.array([prod(theirs[key]) for key in self.keys], np.intp)
        ends = self._theirs + self._sizes, self._ours + self._sizes
        self._joins = self._follows(ends[0][:-1], ends[1][:-1], self._theirs[1:], self._ours[1:])
        pairs: dict[Pair | None, int] = {}  # None for what belongs to no expert
        self._pair = np.array([pairs.setdefault(_pair(key), len(pairs)) for key in self.keys], np.intp)
        self._pairs = list(pairs)

    def weights(self, weight: Weight) -> NDArray[np.float64]:
        """The weight of every tensor, ``[K]``."""
        of = [weight.rest if pair is None else weight.experts[pair] for pair in self._pairs]
        return np.array(of, np.float64)[self._pair]

    def blocks(self, move: NDArray[np.bool_], steps: NDArray[np.float64]) -> Iterator[Block]:
        """The tensors that move, in as few blocks as there can be.

        Args:
            move: Which tensors, ``[K]``.
            steps: The step of each, ``[K]``.
        """
        at = np.flatnonzero(move)
        if not at.size:
            return
        # Neighbours that take the same step are one part.
        same = (np.diff(at) == 1) & (np.diff(steps[at]) == 0) & self._joins[at[1:] - 1]
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        theirs, ours, steps = self._theirs[at[first]], self._ours[at[first]], steps[at[first]]
        sizes = np.add.reduceat(self._sizes[at], first)
        # Parts of the same size that follow each other are one block.
        follow = self._follows((theirs + sizes)[:-1], (ours + sizes)[:-1], theirs[1:], ours[1:])
        block = np.flatnonzero(np.concatenate([[True], ~(follow & (np.diff(sizes) == 0))]))
        for start, end in zip(block.tolist(), [*block[1:].tolist(), len(sizes)], strict=True):
            a, b, length = int(theirs[start]), int(ours[start]), int(sizes[start]) * (end - start)
            yield Block(slice(a, a + length), slice(b, b + length), steps[start:end])

    @staticmethod
    def _follows(
        their_ends: NDArray[np.intp],
        our_ends: NDArray[np.intp],
        their_starts: NDArray[np.intp],
        our_starts: NDArray[np.intp],
    ) -> NDArray[np.bool_]:
        both: NDArray[np.bool_] = (their_ends == their_starts) & (our_ends == our_starts)
        return both


def _pair(key: Key) -> Pair | None:
    return None if key.expert == NO_EXPERT else (key.site, key.expert)
