"""Emulated fine-tuning of a large model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from molehill.catalogue import register
from molehill.decoding.interfaces import BASE, Array, Passes, Scores, Strategy, log_softmax, other

_LARGE = "large"


@dataclass(frozen=True)
class EmulatedFtParams:
    """Parameters of `EmulatedFt`.

    Attributes:
        beta: How much of what training changed in the small model the large one gets; 0 is the large model itself.
        top_p: Tokens may be chosen from the fewest of the large model that have this probability together; 1 for all.
    """

    beta: Annotated[float, Ge(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 0.9


@register(
    "decoding",
    "emulated_ft",
    params=EmulatedFtParams,
    paper="Mitchell et al. 2024, An Emulator for Fine-Tuning Large Language Models using Small Language Models",
    url="https://arxiv.org/abs/2310.12962",
    seeds=("S108",),
)
class EmulatedFt(Strategy):
    """A large model that nobody trained, steered by what training changed in a small one; it needs ``--large MODEL``.

    ``log p = log p_large + beta (log p_tuned - log p_small)``, anew normalised: up-scaling. Tuned is the
    model that was trained, small its base without experts. Both models read the same tokens; where one has more
    logits, for tokens that no text has, these are left out. Tokens outside the large model's top p cannot be chosen.
    Differs: every token is asked of all three, where the paper may let the small model write ahead.
    """

    on_device = False
    writes = True
    asks = (_LARGE,)

    def __init__(self, params: EmulatedFtParams) -> None:
        self._params = params

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:  # noqa: ARG002  (of the interface)
        """See `Strategy.begin`.

        Raises:
            AnswerError: There is no large model.
        """
        said, large = self._params, other(passes, _LARGE)
        width = min(large.answers, passes.answers)

        def scores(ids: Sequence[int]) -> Array:
            first = log_softmax(large.logits(ids)[:width])
            steered = first
            if said.beta:
                tuned = log_softmax(passes.logits(ids)[:width])
                small = log_softmax(passes.logits(ids, BASE, "small")[:width])
                steered = first + said.beta * (tuned - small)
            found = np.full(passes.answers, -np.inf)
            found[:width] = np.where(_top(first, said.top_p), steered, -np.inf)
            return found

        return scores


def _top(logp: Array, p: float) -> Array:
    """Which tokens are among the fewest that have the probability ``p`` together, bool ``[V]``."""
    if p == 1:
        return np.ones(len(logp), bool)
    order = np.argsort(-logp, kind="stable")
    found = np.zeros(len(logp), bool)
    found[order[: int(np.searchsorted(np.cumsum(np.exp(logp[order])), p)) + 1]] = True
    return found
