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
    out = dict.fromkeys(pairs, 1.0)
    routed = {pair: mass for pair, mass in tokens.items() if not pair[1].startswith(ALWAYS_ON)}
    totals: dict[str, float] = {}
    for (site, _), mass in routed.items():
        totals[site] = totals.get(site, 0.0) + mass
    for pair in out.keys() - routed.keys():
        if totals.get(pair[0], 0.0) > 0 and not pair[1].startswith(ALWAYS_ON):
            out[pair] = 0.0
    for pair in out.keys() & routed.keys():
        if (total := totals[pair[0]]) > 0:
            out[pair] = routed[pair] / total
    return out
