"""Real numbers as integers modulo 2^64, of which any client's share of a sum is hidden by a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molehill.config import Config
from molehill.errors import MessageError
from molehill.secure.masks import Numbers

FIGURE = 64.0  # losses beyond it count as it
_LEAST = 16  # binary places below which a mean would be coarse


@dataclass(frozen=True)
class FixedPoint:
    """Numbers with so many binary places, in two's complement.

    Attributes:
        bits: Binary places.
        largest: Largest size of a number that one client may put in.
    """

    bits: int
    largest: float

    @classmethod
    def of(cls, config: Config, clients: int, cap: int) -> FixedPoint:
        """As many places as a sum can have without overflow: ``clients * cap * range * 2^bits <= 2^62``.

        The range is that of a change times a weight of 1: the clip of differential privacy or ``round.norm_bound``,
        since no number is larger than the norm of all; and that of a loss.

        Args:
            config: The run.
            clients: Most clients in the sum.
            cap: Largest weight of a client.

        Raises:
            MessageError: Too few places would be left.
        """
        bound = config.privacy.clip or config.round.masked_bound
        if bound is None:
            raise MessageError("secure aggregation needs round.norm_bound, or nothing bounds a sum")
        largest = cap * max(bound, FIGURE)
        bits = 62 - int(np.ceil(np.log2(clients * largest)))
        if bits < _LEAST:
            raise MessageError(
                f"a sum over {clients} clients of weight up to {cap} and changes up to {bound:g} leaves {bits} binary "
                f"places, at least {_LEAST} are needed",
                mend="Lower round.norm_bound or privacy.max_examples.",
            )
        return cls(bits, largest)

    def encode(self, values: NDArray[np.float64]) -> Numbers:
        """Cut to the grid towards zero, so that no norm grows.

        Raises:
            MessageError: A value is not finite or larger than it may be.
        """
        if not np.abs(values).max(initial=0.0) <= self.largest:  # NaN fails too
            raise MessageError(f"a value is not finite, or above {self.largest:g}", mend="Training diverged.")
        return np.trunc(np.ldexp(values, self.bits)).astype(np.int64).view(np.uint64)

    def decode(self, numbers: Numbers) -> NDArray[np.float64]:
        """Undo `encode`, for one value or for a sum."""
        return np.ldexp(numbers.view(np.int64).astype(np.float64), -self.bits)
