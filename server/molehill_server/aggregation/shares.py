"""How a client's tokens are divided among experts."""

from __future__ import annotations

from molehill.wire.keys import NO_EXPERT
from molehill.wire.usage import ALWAYS_ON, usage
from molehill_server.records import Pair, Update

__all__ = ["ALWAYS_ON", "shares"]


def shares(update: Update) -> dict[Pair, float]:
    """Fraction of the client's gate mass that went to every (site, expert) in its update; see `usage`."""
    pairs = {(key.site, key.expert) for key in update.tree if key.expert != NO_EXPERT}
    return usage(pairs, update.tokens)
