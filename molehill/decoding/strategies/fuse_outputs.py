"""A small net over what the experts say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Example, Passes, Scores, Strategy, Through, all_of, log_softmax
from molehill.decoding.judging import alone, condition, conditions, require_answer, require_rows
from molehill.errors import AnswerError

_WIDEST = 8192
_BETAS, _TINY = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class FuseOutputsParams:
    """Parameters of `FuseOutputs`.

    Attributes:
        rows: A file of labelled rows that the net is fitted to.
        risk: Above 0, experts are asked one by one until the risk is below; at 0 all are asked.
        neighbours: How many rows the risk is estimated from.
        inputs: What the net reads: the experts' probabilities of the classes, or also what the text is like.
        hidden: Width of the net; 0 for four times its inputs, at most 8192.
        epochs: How often it sees every row.
        batch: Rows of a step.
        lr: Step size at the start; it falls to 0 as a cosine.
        decay: Weight decay.
        seed: Of its first weights and of the order of rows.
    """

    rows: str = ""
    risk: Annotated[float, Ge(0), Le(1)] = 0.0
    neighbours: Annotated[int, Ge(1)] = 9
    inputs: Literal["probabilities", "both"] = "probabilities"
    hidden: Annotated[int, Ge(0)] = 0
    epochs: Annotated[int, Ge(1)] = 100
    batch: Annotated[int, Ge(1)] = 16
    lr: Annotated[float, Gt(0)] = 1e-3
    decay: Annotated[float, Ge(0)] = 1e-4
    seed: Annotated[int, Ge(0)] = 0


@register(
    "decoding",
    "fuse_outputs",
    params=FuseOutputsParams,
    paper="Wang et al. 2024, Fusing Models with Complementary Expertise",
    url="https://arxiv.org/abs/2310.01542",
    seeds=("S130",),
)
class FuseOutputs(Strategy):
    """A small net says the class from the class probabilities of all experts, so it may be right where none of them is.

    One hidden layer, fitted to labelled rows with AdamW. Frugal, for a ``risk`` above 0: the expert that is best alone
    is asked first; the risk of what was asked so far is how often its k nearest rows, by what those experts said, are
    told wrong by their own nearest rows; while it is not below the limit, the expert is asked that would leave the
    least. The nearest rows' labels are the answer if not all are asked. The paper goes on while another expert lowers
    the risk by enough; and for texts it joins the experts' own states, which passes do not tell: what a text is like in
    the base may be joined instead. Its nets are 8192 wide and see ten epochs of many rows.
    """

    routed = True
    classifies = True

    def __init__(self, params: FuseOutputsParams) -> None:
        self._params = params
        self._net: _Net | None = None

    @property
    def rows(self) -> str:
        """See `Learns.rows`."""
        return self._params.rows

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`.

        Raises:
            AnswerError: A row has no label.
        """
        require_rows(examples)
        for example in examples:
            require_answer(example)
        self._labels = np.array([example.answer[0] for example in examples])
        self._said = np.stack([[told() for told in _experts(passes, example.ids)] for example in through(examples)])
        x = self._said.reshape(len(examples), -1)
        if self._params.inputs == "both":
            x = np.concatenate([x, conditions(passes, examples, through)], 1)
        self._net = _Net(x, self._labels, passes.answers, self._params)
        self._wrong: dict[tuple[int, ...], Array] = {}

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:  # noqa: ARG002  (of the interface)
        """See `Strategy.begin`.

        Raises:
            AnswerError: It was fitted to no rows.
        """
        if self._net is None:
            raise AnswerError("the net is fitted to labelled rows", where="--strategy", mend="Add --set rows=FILE.")

        def scores(ids: Sequence[int]) -> Array:
            experts = _experts(passes, ids)
            if self._params.risk > 0 and (found := self._frugal(experts, passes.answers)) is not None:
                return found
            return self._fused(passes, ids, np.concatenate([told() for told in experts]))

        return scores

    def _fused(self, passes: Passes, ids: Sequence[int], said: Array) -> Array:
        assert self._net is not None
        if self._params.inputs == "both":
            said = np.concatenate([said, condition(passes, ids)])
        return self._net(said)

    def _frugal(self, experts: Sequence[Callable[[], Array]], classes: int) -> Array | None:
        """The answer of the nearest rows once the risk is low; None when all experts would be asked."""
        everybody = range(len(experts))
        asked = [min(everybody, key=lambda e: float(self._mistaken([e]).mean()))]
        said = {asked[0]: experts[asked[0]]()}
        while len(asked) < len(experts):
            places = sorted(asked)
            text = np.concatenate([said[place] for place in places])
            near = self._nearest(((self._of(places) - text) ** 2).sum(1))
            if float(self._mistaken(places)[near].mean()) < self._params.risk:
                votes = np.bincount(self._labels[near], minlength=classes) / len(near)
                return np.log(votes, out=np.full(classes, -np.inf), where=votes > 0)
            left = [place for place in everybody if place not in asked]
            best = min(left, key=lambda e: float(self._mistaken([*asked, e])[near].mean()))
            asked.append(best)
            said[best] = experts[best]()
        return None

    def _of(self, experts: Sequence[int]) -> Array:
        """What some experts said of the rows, ``[N, len * C]``."""
        return self._said[:, list(experts)].reshape(len(self._said), -1)

    def _mistaken(self, experts: Sequence[int]) -> Array:
        """For every row, whether its nearest other rows, by what some experts said, have another label."""
        key = tuple(sorted(experts))
        if key not in self._wrong:
            rows, found = self._of(key), np.zeros(len(self._said), bool)
            for n, row in enumerate(rows):
                distance = ((rows - row) ** 2).sum(1)
                distance[n] = np.inf
                near = self._nearest(distance)
                found[n] = np.bincount(self._labels[near[near != n]], minlength=1).argmax() != self._labels[n]
            self._wrong[key] = found
        return self._wrong[key]

    def _nearest(self, distance: Array) -> Array:
        return np.argsort(distance, kind="stable")[: self._params.neighbours]


def _experts(passes: Passes, ids: Sequence[int]) -> list[Callable[[], Array]]:
    """What asks every expert for its probabilities of the classes ``[C]``; each is asked at most once."""

    def asking(name: str, place: int) -> Callable[[], Array]:
        return functools.cache(lambda: np.exp(log_softmax(passes.logits(ids, settings[place], name))))

    settings = alone(passes)
    return [asking(name, place) for place, name in enumerate(passes.experts)]


class _Net:
    """A net with one hidden layer of ReLU.

    Args:
        x: Its inputs for the rows, ``[N, d]``.
        labels: Of the rows.
        classes: How many there are.
        said: How it is fitted.
    """

    def __init__(self, x: Array, labels: Array, classes: int, said: FuseOutputsParams) -> None:
        random = np.random.default_rng(said.seed)
        hidden = said.hidden or min(_WIDEST, 4 * x.shape[1])
        self._mean, spread = x.mean(0), x.std(0)
        self._scale = np.where(spread > 0, spread, 1.0)
        x = (x - self._mean) / self._scale
        limits = [1 / np.sqrt(size) for size in (x.shape[1], x.shape[1], hidden, hidden)]
        shapes = [(x.shape[1], hidden), (hidden,), (hidden, classes), (classes,)]
        self._weights = [random.uniform(-a, a, shape) for a, shape in zip(limits, shapes, strict=True)]
        moments = [[np.zeros(shape) for shape in shapes] for _ in _BETAS]
        steps = said.epochs * -(-len(x) // said.batch)
        step = 0
        for _ in range(said.epochs):
            order = random.permutation(len(x))
            for start in range(0, len(x), said.batch):
                rows = order[start : start + said.batch]
                lr = said.lr * 0.5 * (1 + np.cos(np.pi * step / steps))
                step += 1
                for i, slope in enumerate(self._slopes(x[rows], np.eye(classes)[labels[rows]])):
                    for m, (beta, value) in enumerate(zip(_BETAS, (slope, slope**2), strict=True)):
                        moments[m][i] += (1 - beta) * (value - moments[m][i])
                    first, second = (moments[m][i] / (1 - beta**step) for m, beta in enumerate(_BETAS))
                    self._weights[i] -= lr * (first / (np.sqrt(second) + _TINY) + said.decay * self._weights[i])

    def _slopes(self, x: Array, wanted: Array) -> tuple[Array, Array, Array, Array]:
        w, b, v, _ = self._weights
        seen = np.maximum(x @ w + b, 0)
        back = (np.exp(log_softmax(self._top(seen))) - wanted) / len(x)
        inner = (back @ v.T) * (seen > 0)
        return x.T @ inner, inner.sum(0), seen.T @ back, back.sum(0)

    def _top(self, seen: Array) -> Array:
        found: Array = seen @ self._weights[2] + self._weights[3]
        return found

    def __call__(self, x: Array) -> Array:
        """Logits of the classes for inputs ``[d]``."""
        w, b, _, _ = self._weights
        return self._top(np.maximum((x - self._mean) / self._scale @ w + b, 0))
