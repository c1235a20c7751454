"""Whether a bundle answers here as it did where it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from molehill_edge import manifest as manifests

if TYPE_CHECKING:
    from molehill_edge.view import View

Array = NDArray[Any]

# Kernels of other processors add up in another order, and round activations to int8 at other places.
_EXACT, _ROUNDED = 1e-6, 2e-2
_FLIPS = 0.1  # of best classes or tokens, which near ties may change


@dataclass(frozen=True)
class Check:
    """How the golden inputs came out.

    Attributes:
        inputs: How many there are.
        agreement: Fraction with the same best class or token.
        error: Largest mean squared difference of logits over their spread, see `Reading.spread`.
        tolerance: What may be.
    """

    inputs: int
    agreement: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the bundle works on this device."""
        least = 1.0 if self.tolerance == _EXACT else 1 - _FLIPS
        return self.error <= self.tolerance and self.agreement >= least


def check(view: View) -> Check:
    """Compute the golden inputs, each alone: in a batch, rounding of activations would differ.

    Args:
        view: A bundle with its default gate and its own experts.

    Raises:
        BundleError: The graph cannot be computed.
    """
    manifest = view.manifest
    reading = manifests.reading(manifest.task)
    errors, same = [0.0], list[bool]()
    for golden in manifest.golden:
        ids = np.array([list(golden.input_ids)], np.int64)
        logits = view.forward(ids, np.ones_like(ids), ["logits"])[0][0]
        logits = logits[-1] if logits.ndim == 2 else logits
        wanted = np.array(golden.logits, np.float64)
        difference = logits[: len(wanted)].astype(np.float64) - wanted
        errors.append(
            float((difference**2).mean()) / max(reading.spread(float(wanted.mean()), float((wanted**2).mean())), 1e-12)
        )
        same.append(int(logits.argmax()) == golden.best)
    quantisation = manifest.quantisation
    exact = {quantisation.base, quantisation.experts, quantisation.head or "fp32"} == {"fp32"}
    return Check(len(same), float(np.mean(same or [True])), max(errors), _EXACT if exact else _ROUNDED)
