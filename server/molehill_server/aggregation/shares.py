"""How a client's tokens are divided among experts."""

from __future__ import annotations

from molehill.wire.keys import NO_EXPERT
from molehill_server.records import Pair, Update

ALWAYS_ON = "shared"  # prefix of the ids of experts that see every token


def shares(update: Update) -> dict[Pair, float]:
    """Fraction of the client's gate mass that went to every (site, expert) in its update.

    An always-on expert has 1. So has every expert of a site whose routing the client did not report.
    """
    totals: dict[str, float] = {}
    for (site, expert), tokens in update.tokens.items():
        if not expert.startswith(ALWAYS_ON):
            totals[site] = totals.get(site, 0.0) + tokens
    out = {}
    for site, expert in {(key.site, key.expert) for key in update.tree if key.expert != NO_EXPERT}:
        total = totals.get(site, 0.0)
        routed = total > 0 and not expert.startswith(ALWAYS_ON)
        out[site, expert] = update.tokens.get((site, expert), 0.0) / total if routed else 1.0
    return out
