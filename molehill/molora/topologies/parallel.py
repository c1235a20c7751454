"""Experts beside every adapted linear."""

from __future__ import annotations

from molehill.molora.interfaces import Topology
from molehill.registry import register


@register("topology", "parallel", paper="house: every expert is a delta on the frozen output of its own linear")
class Parallel(Topology):
    """Every site adds its experts' mixed delta to its own output."""
