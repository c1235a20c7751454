"""A tree over what texts are like, in whose leaves different experts are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Example, Passes, Picker, Through, all_of
from molehill.decoding.judging import condition, conditions, likelihoods, named, place_of, require_rows
from molehill.errors import AnswerError

_EVEN = 0.5  # a value that says neither good nor bad


@dataclass(frozen=True)
class TreeParams:
    """Parameters of `Tree`.

    Attributes:
        column: The column of the rows that names the expert whose answer was judged.
        value: The column that says how good it was: 0 to 1, or true or false. Where a row lacks it, all experts are
            judged by the probability that they give its answer.
        kappa: How many thresholds are tried in each dimension of a node, evenly between its bounds.
        split: The fewest rows of a node that may be split.
        leaf: The fewest rows of a child.
        alpha: So many even judgements are added to those of every expert.
    """

    column: str = "expert"
    value: str = "value"
    kappa: Annotated[int, Ge(1)] = 1
    split: Annotated[int, Ge(2)] = 2
    leaf: Annotated[int, Ge(1)] = 2
    alpha: Annotated[float, Gt(0)] = 1.0


@register(
    "picker",
    "tree",
    params=TreeParams,
    paper="Abels et al. 2023, Expertise Trees Resolve Knowledge Limitations in Collective Decision-Making",
    url="https://arxiv.org/abs/2305.01063",
    seeds=("S170",),
)
class Tree(Picker):
    """An axis-aligned tree over the mean of the base's last states; every leaf has its own linear values of experts.

    Learns from feedback: which expert answered a text, and how well. A node is replayed in the order of its rows: a
    fresh model chooses before it sees each, and the sum of ``(value - 1/2) pi / p`` is the node's value, where pi is
    how likely it chose the judged expert and p how often that was judged. The best split stands if its children's
    values together exceed the node's; thresholds lie in the middle of the bounds of a dimension (authors' code,
    kappa 1). In their bandits the experts advise on arms; here they are the arms, and advise themselves, so that the
    linear model is a ridge over one-hot advice. Bounds are those of the rows, and p is an expert's share of them.
    """

    on_device = False

    def __init__(self, params: TreeParams) -> None:
        self._params = params
        self._root: _Node | None = None

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`.

        Raises:
            AnswerError: A value is none, a row with one names no expert, or a row has neither value nor answer.
        """
        require_rows(examples)
        column, value = self._params.column, self._params.value
        gain = np.zeros((len(examples), len(passes.experts)))
        judged = [row for row, example in enumerate(examples) if value in example.columns]
        tried = [row for row, example in enumerate(examples) if value not in example.columns]
        if tried:
            gain[tried] = likelihoods(passes, [examples[row] for row in tried], through) - _EVEN
        seen = np.zeros(gain.shape)
        seen[tried] = 1.0
        if judged:
            places = [place_of(passes, examples[row], column) for row in judged]
            gain[judged, places] = [_number(named(examples[row], value)) - _EVEN for row in judged]
            seen[judged, places] = len(judged) / np.bincount(places)[places]  # one over their share
        self._gain, self._seen, self._rows = gain, seen, conditions(passes, examples, through)
        everything = np.arange(len(examples))
        bounds = np.stack([self._rows.min(0), self._rows.max(0)])
        self._root = self._grown(everything, bounds, self._replayed(everything))

    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """See `Picker.scores`: values from 0 to 1."""
        assert self._root is not None
        node, text = self._root, condition(passes, prompt)
        while node.below is not None and node.above is not None:
            node = node.below if text[node.dimension] <= node.threshold else node.above
        return node.values

    @property
    def leaves(self) -> int:
        """How many leaves the tree has."""
        nodes, found = [self._root], 0
        while nodes:
            node = nodes.pop()
            if node is not None:
                found += node.below is None
                nodes += [node.below, node.above]
        return found

    def _grown(self, rows: Array, bounds: Array, value: float) -> _Node:
        """The tree of some rows in a box ``[2, d]``, whose replayed value is known."""
        said, node = self._params, _Node(self._values(rows))
        if len(rows) < said.split:
            return node
        best = (value, -1, 0.0, 0.0, 0.0)
        for dimension, (low, high) in enumerate(bounds.T):
            for threshold in np.linspace(low, high, said.kappa + 2)[1:-1]:
                below = self._rows[rows, dimension] <= threshold
                if min(below.sum(), (~below).sum()) < said.leaf:
                    continue
                values = self._replayed(rows[below]), self._replayed(rows[~below])
                if sum(values) > best[0] + 1e-9:
                    best = (sum(values), dimension, float(threshold), *values)
        _, dimension, threshold, first, second = best
        if dimension < 0:
            return node
        below = self._rows[rows, dimension] <= threshold
        lower, upper = bounds.copy(), bounds.copy()
        lower[1, dimension] = upper[0, dimension] = threshold
        node.dimension, node.threshold = dimension, threshold
        node.below, node.above = self._grown(rows[below], lower, first), self._grown(rows[~below], upper, second)
        return node

    def _replayed(self, rows: Array) -> float:
        """What a fresh model would have gained on some rows, one after another."""
        gain, seen = self._gain[rows], self._seen[rows]
        known = seen > 0
        before: Array = np.cumsum(known, 0) - known
        guess = (np.cumsum(gain * known, 0) - gain * known) / (before + self._params.alpha)
        first = guess >= guess.max(1, keepdims=True) - 1e-12  # equals are chosen alike
        return float((first / first.sum(1, keepdims=True) * seen * gain).sum())

    def _values(self, rows: Array) -> Array:
        known = self._seen[rows] > 0
        found: Array = (self._gain[rows] * known).sum(0) / (known.sum(0) + self._params.alpha) + _EVEN
        return found


@dataclass
class _Node:
    """A leaf, unless it has children.

    Attributes:
        values: Of the experts.
        dimension: Where it is split.
        threshold: Up to which texts belong below.
        below: The child of those.
        above: The child of the others.
    """

    values: Array
    dimension: int = 0
    threshold: float = 0.0
    below: _Node | None = None
    above: _Node | None = None


def _number(text: str) -> float:
    """A judgement as a number from 0 to 1.

    Raises:
        AnswerError: It is none.
    """
    words = {"true": 1.0, "false": 0.0}
    try:
        found = words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise AnswerError(f"a row has the value {text!r}", where="--set rows", mend="Give 0 to 1, or true or false.")
    return found
