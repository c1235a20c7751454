"""What a client puts into a sum: numerators, denominators and a few figures, in the same order for everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molehill.config import Config
from molehill.secure.fixed import FIGURE
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Layout, Tree
from molehill.wire.usage import Pair, usage

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """What `Form.read` finds.

    Attributes:
        change: ``sum_k w_k d_k`` over the layout, ``[layout.size]``.
        experts: Sum of weights of every expert.
        weight: Sum of the clients' weights, which also is that of every tensor without an expert.
        figures: ``sum_k w_k x_k`` of every figure.
    """

    change: Values
    experts: Mapping[Pair, float]
    weight: float
    figures: tuple[float, ...]

    def mean(self, layout: Layout) -> Values:
        """The change of every tensor over the sum of its weights, ``[layout.size]``; 0 where nobody has any."""
        out = np.zeros(layout.size)
        for key in layout:
            total = self.weight if key.expert == NO_EXPERT else self.experts[key.site, key.expert]
            if total > 0:
                out[layout.span(key)] = self.change[layout.span(key)] / total
        return out


def figures_of(config: Config) -> list[str]:
    """Names of the numbers beside the tensors: the loss, and every routing loss."""
    return list(dict.fromkeys(("loss", *(ref.name for ref in config.molora.losses))))


class Form:
    """The order of the numbers.

    A client counts as in rule ``mean``: with its examples n_k, up to a cap, times the fraction of its tokens that an
    expert got. Every client fills in all numbers, also for experts that got no token: then they are 0.

    Args:
        layout: The tensors that are shared.
        figures: How many other numbers there are; see `figures_of`.
    """

    def __init__(self, layout: Layout, figures: int) -> None:
        self.layout = layout
        self.pairs = sorted({(key.site, key.expert) for key in layout if key.expert != NO_EXPERT})
        self.figures = figures
        self.size = layout.size + len(self.pairs) + 1 + figures

    def fill(
        self, change: Tree, weight: float, tokens: Mapping[Pair, float] | None, figures: Sequence[float]
    ) -> Values:
        """The numbers of one client.

        Args:
            change: Of the shared tensors.
            weight: The client's.
            tokens: Gate mass by site and expert; None when all experts count alike.
            figures: The other numbers.

        Returns:
            The vector, ``[size]``.
        """
        shares = dict.fromkeys(self.pairs, 1.0) if tokens is None else usage(self.pairs, tokens)
        weights = [weight * shares[pair] for pair in self.pairs]
        known = dict(zip(self.pairs, weights, strict=True))
        out = np.empty(self.size)
        out[: self.layout.size] = change.flat
        for key in self.layout:
            out[self.layout.span(key)] *= weight if key.expert == NO_EXPERT else known[_pair(key)]
        told = np.clip(figures, -FIGURE, FIGURE)
        out[self.layout.size :] = [*weights, weight, *(weight * told)]
        return out

    def read(self, values: Values) -> Sums:
        """Take the sum of several vectors apart."""
        size, count = self.layout.size, len(self.pairs)
        experts = dict(zip(self.pairs, values[size : size + count].tolist(), strict=True))
        weight, *figures = values[size + count :].tolist()
        return Sums(values[:size], experts, weight, tuple(figures))


def _pair(key: Key) -> Pair:
    return key.site, key.expert
