"""Norms of flat vectors, and clipping to one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehill.wire.tree import Tree

_CHUNK = 65536  # numbers
_SLACK = 1e-6  # relative; more than float32 rounds a norm by


def norm(flat: NDArray[np.floating[Any]]) -> float:
    """L2 norm in float64, without a float64 copy of the whole vector."""
    parts = (flat[start : start + _CHUNK].astype(np.float64) for start in range(0, len(flat), _CHUNK))
    return math.sqrt(sum(float(part @ part) for part in parts))


def clip(tree: Tree, bound: float) -> Tree:
    """The tree itself, or scaled down as a whole to an L2 norm of at most ``bound``.

    Raises:
        MessageError: A value is NaN or infinite: no norm bounds it.
    """
    size = norm(tree.require_finite().flat)
    if size <= bound:
        return tree
    return Tree(tree.layout, (tree.flat * (bound * (1 - _SLACK) / size)).astype(np.float32))
