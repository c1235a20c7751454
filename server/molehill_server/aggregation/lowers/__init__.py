"""Lowers: how a combined product comes back to factors of the shared rank."""

from __future__ import annotations

from molehill_server.aggregation.interfaces import Lower

INTERFACE = Lower
WORDS = ("factorisation", "factorization", "projection")
