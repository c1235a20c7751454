"""What the adaptive server optimisers share (Reddi et al. 2021, https://arxiv.org/abs/2003.00295, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from molehill.wire.keys import Key
from molehill.wire.tree import Array, Layout, Tree
from molehill_server.aggregation.interfaces import ServerOpt
from molehill_server.records import State


def checked(*, lr: float, beta: float = 0.0, beta2: float = 0.0, tau: float = 1.0) -> None:
    """Check the ranges that all server optimisers have in common.

    Raises:
        ValueError: A value lies outside.
    """
    if lr <= 0 or tau <= 0:
        raise ValueError("lr and tau must be above 0")
    if not (0 <= beta < 1 and 0 <= beta2 < 1):
        raise ValueError("every beta must be at least 0 and below 1")


def moment(state: State, name: str, layout: Layout, start: float) -> Tree:
    """A copy of a moment from the state, or a new one filled with ``start``."""
    held = state.get(name)
    return held.copy() if isinstance(held, Tree) else Tree(layout, np.full(layout.size, start, np.float32))


def adapt(
    old: Tree,
    new: Tree,
    touched: frozenset[Key],
    state: State,
    *,
    lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Array, Array], Array],
) -> tuple[Tree, State]:
    """One adaptive step without bias correction: ``theta + lr m / (sqrt(v) + tau)``, with v starting at tau squared.

    Args:
        old: The model before the round.
        new: The combined model.
        touched: Keys to move; the others keep value and moments.
        state: Holds the moments ``m`` and ``v``.
        lr: Server learning rate.
        beta1: Decay of m, the mean of changes.
        tau: Degree of adaptivity; small is strong.
        second: Next v from v and the squared change.

    Returns:
        The next model and state.
    """
    out, m, v = old.copy(), moment(state, "m", old.layout, 0.0), moment(state, "v", old.layout, tau**2)
    for key in touched:
        change = new[key] - old[key]
        m[key][...] = beta1 * m[key] + (1 - beta1) * change
        v[key][...] = second(v[key], change**2)
        out[key][...] += lr * m[key] / (np.sqrt(v[key]) + tau)
    return out, {**state, "m": m, "v": v}


@dataclass(frozen=True)
class AdaptiveParams:
    """Parameters of Adam and Yogi.

    Attributes:
        lr: Server learning rate.
        beta1: Decay of the mean of changes.
        beta2: Decay of the mean of squared changes.
        tau: Degree of adaptivity; small is strong.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        checked(lr=self.lr, beta=self.beta1, beta2=self.beta2, tau=self.tau)


class Adaptive(ServerOpt):
    """A server optimiser of this family; one differs from another in its second moment alone."""

    def __init__(self, params: AdaptiveParams) -> None:
        self._params = params

    def apply(self, old: Tree, new: Tree, touched: frozenset[Key], state: State, /) -> tuple[Tree, State]:
        """One step on the touched keys."""
        p = self._params
        return adapt(old, new, touched, state, lr=p.lr, beta1=p.beta1, tau=p.tau, second=self.second)

    def second(self, v: Array, square: Array) -> Array:
        """Next v from v and the squared change."""
        raise NotImplementedError
