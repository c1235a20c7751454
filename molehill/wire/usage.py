"""How a client's tokens are divided among experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

Pair: TypeAlias = tuple[str, str]  # (site, expert)

ALWAYS_ON = "shared"  # prefix of the ids of experts that see every token


def usage(pairs: Iterable[Pair], tokens: Mapping[Pair, float]) -> dict[Pair, float]:
    """Fraction of a client's gate mass that went to every expert.

    Args:
        pairs: The experts.
        tokens: Gate mass by site and expert.

    Returns:
        The fraction by site and expert. An always-on expert has 1. So has every expert of a site whose routing the
        client did not report.
    """
    totals: dict[str, float] = {}
    for (site, expert), mass in tokens.items():
        if not expert.startswith(ALWAYS_ON):
            totals[site] = totals.get(site, 0.0) + mass
    out = {}
    for site, expert in pairs:
        total = totals.get(site, 0.0)
        routed = total > 0 and not expert.startswith(ALWAYS_ON)
        out[site, expert] = tokens.get((site, expert), 0.0) / total if routed else 1.0
    return out
