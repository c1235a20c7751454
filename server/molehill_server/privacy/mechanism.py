"""The noisy mean of a round."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molehill.config import Privacy
from molehill.errors import MessageError
from molehill.wire.clipping import norm
from molehill.wire.tree import Array, Layout, Tree
from molehill_server.privacy.noise import Noise
from molehill_server.records import Global, Update

_CHUNK = 2**20  # numbers


@dataclass(frozen=True)
class Mechanism:
    """Gaussian mechanism on the sum of clipped changes (DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963).

    With the change d_k of client k over all tensors it shares, clipped to ``||d_k|| <= C``, and its weight
    ``0 <= w_k <= 1``, the next model is ``old + (sum_k w_k d_k + N(0, (z C)^2 I)) / m``.

    Sensitivity: without client k, or with other data at client k, the sum moves by at most ``C``, or ``2 C``. That
    holds because nothing else in the formula depends on anybody's data. The weights are 1, or ``min(n_k, cap) / cap``;
    weights ``n_k / sum n`` would not do: they change with every other client's data, and one large client would weigh
    almost 1. Neither do weights by routed tokens, which differ per expert and would have to be clipped and noised as
    well: they are not used, and every expert gets the noise, whether anybody trained it or not, since a missing noise
    would tell. And m is the number of clients that were asked, not of those that answered; where each is drawn by
    itself, the number that is expected, since no coin may tell.

    Clipping happens at the client, so that it can trust the bound, and again here in float64, since the wire's codec
    rounds.

    Attributes:
        clip: C.
        noise: z, the standard deviation of the noise on the sum over C.
        max_examples: The cap; None for equal weights.
    """

    clip: float
    noise: float
    max_examples: int | None = None

    @classmethod
    def of(cls, privacy: Privacy) -> Mechanism | None:
        """The mechanism of a configuration; None when privacy is off."""
        if privacy.clip is None or privacy.noise is None:
            return None
        return cls(privacy.clip, privacy.noise, privacy.max_examples)

    def weight(self, examples: int) -> float:
        """How much a client counts, at most 1."""
        return 1.0 if self.max_examples is None else min(examples, self.max_examples) / self.max_examples

    def sum(self, glob: Global, updates: Iterable[Update], layout: Layout) -> tuple[NDArray[np.float64], int]:
        """The weighted sum of the clipped changes, without noise: nothing that may leave the server.

        Args:
            glob: The model the clients started from.
            updates: Their updates; one is in memory at a time.
            layout: What each of them shares.

        Returns:
            The sum ``[layout.size]``, and the number of updates.

        Raises:
            MessageError: An update holds other tensors.
        """
        old = glob.tree.select(layout).flat
        total, count = np.zeros(layout.size), 0
        for update in updates:
            if update.tree.layout != layout:
                raise MessageError("it shares other tensors than the others", where=update.client)
            change = _change(update.tree.flat, old)
            size = norm(change)
            scale = min(1.0, self.clip / size) if size else 0.0
            total += (self.weight(update.examples) * scale) * change
            count += 1
        return total, count

    def release(
        self, glob: Global, updates: Iterable[Update], layout: Layout, planned: float, noise: Noise | None = None
    ) -> tuple[Update, dict[str, float]]:
        """The noisy mean as if one client had sent it; all that is done with it later costs no more privacy.

        Args:
            glob: The model the clients started from.
            updates: Their updates.
            layout: What each of them shares.
            planned: m, the number of clients that were asked or expected.
            noise: Where the noise comes from; fresh when omitted.

        Returns:
            The update, and for the report: ``updates``, ``noise`` (standard deviation of a number of the mean) and
            ``signal_to_noise`` (norm of the mean over norm of the noise; estimated from the noisy mean, since the
            exact one would be one more thing to protect).

        Raises:
            MessageError: An update holds other tensors than ``layout``.
        """
        total, count = self.sum(glob, updates, layout)
        return self.noisy(glob, layout, total, count, planned, noise)

    def noisy(
        self,
        glob: Global,
        layout: Layout,
        total: NDArray[np.float64],
        count: int,
        planned: float,
        noise: Noise | None = None,
    ) -> tuple[Update, dict[str, float]]:
        """`release` for a sum that is already there, for example that of secure aggregation.

        Args:
            glob: The model the clients started from.
            layout: What each of them shares.
            total: The weighted sum of clipped changes, ``[layout.size]``; it is overwritten.
            count: The number of updates in it.
            planned: m, the number of clients that were asked or expected.
            noise: Where the noise comes from; fresh when omitted.

        Returns:
            See `release`.
        """
        noise = noise or Noise()
        deviation = self.clip * self.noise
        for start in range(0, layout.size, _CHUNK):
            part = total[start : start + _CHUNK]
            part += deviation * noise.normal(len(part))
        total /= planned
        deviation /= planned
        expected = layout.size * deviation**2  # of the squared norm of the noise
        report = {
            "updates": float(count),
            "noise": deviation,
            "signal_to_noise": math.sqrt(max(float(total @ total) / expected - 1, 0.0)) if expected else 0.0,
        }
        values = (glob.tree.select(layout).flat + total).astype(np.float32)
        return Update("the noisy mean", Tree(layout, values), examples=1), report


def _change(new: Array, old: Array) -> NDArray[np.float64]:
    return new.astype(np.float64) - old
