"""How a client's tokens are divided among experts."""

from __future__ import annotations

from molehill.wire.usage import ALWAYS_ON, usage
from molehill_server.records import Pair, Update

__all__ = ["ALWAYS_ON", "shares"]


def shares(update: Update) -> dict[Pair, float]:
    """Fraction of the client's gate mass that went to every (site, expert) in its update; see `usage`."""
    return usage(update.tree.layout.experts, update.tokens)
