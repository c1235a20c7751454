"""FedSVD."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.presets import Preset


@register("federation", "fedsvd", paper="Lee et al. 2025, FedSVD", url="https://arxiv.org/abs/2505.12805")
def fedsvd() -> Preset:
    """Only B is trained and sent, as in FFA; then ``B A = U S V`` is written anew as ``B = U S``, ``A = V``.

    So A has orthonormal rows and follows what was learnt, and the mean of products stays exact.
    """
    return {
        "policy": "ffa",
        "space": {"name": "common", "factor": "A"},
        "rule": "mean",
        "lower": "svd",
    }
