"""How much more a model has come to like one of two answers than its base does."""

from __future__ import annotations

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class


def margins(forward: Forward) -> Tensor:
    """Return ``log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected)`` of every pair, ``[P]`` float32, in nats.

    Probabilities are of whole answers: logarithms are summed over their tokens. The reference is the base with all
    adapters off, which is run once more.

    Args:
        forward: Of rows in pairs: the chosen answer in row 2i, the rejected one in row 2i + 1.
    """
    ratios = of_class(forward.reference(), forward.labels) - forward.nll()
    pairs = int(forward.rows.max()) // 2 + 1
    of_rows = ratios.new_zeros(2 * pairs).index_add(0, forward.rows, ratios)
    return of_rows[0::2] - of_rows[1::2]
