"""Mix the experts' outputs: the usual mixture."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.banks import Bank, Mixer
from molehill.registry import register


@register(
    "mixer",
    "output",
    paper="Jacobs et al. 1991, Adaptive mixtures of local experts",
    url="https://doi.org/10.1162/neco.1991.3.1.79",
)
class OutputMixer(Mixer):
    """``sum_e w_e delta_e(x)``; low-rank banks take the fused path."""

    fused = True

    def __call__(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]`` for weights ``[B|1, T|1, E]``."""
        return bank.delta(x, y0, weights)
