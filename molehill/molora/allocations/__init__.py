"""Allocations: how many experts of which rank every site gets."""

from __future__ import annotations

from molehill.molora.interfaces import Allocation

INTERFACE = Allocation
WORDS = ("ranks", "layers")
