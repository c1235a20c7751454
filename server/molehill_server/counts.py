"""How many rows a client counts for: what it first said, up to a cap.

Rule `mean` weighs by rows, and nobody but the client knows how many it has. So what it says when it first joins a run
stays, also when it comes back with more, and no claim counts beyond a cap: by itself three times the median of all
claims, which fewer than half of the clients cannot move beyond what honest ones say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from molehill.config import Config

TIMES = 3


@dataclass(frozen=True)
class Count:
    """What one client counts for.

    Attributes:
        rows: Rows it says it has.
        counts: Rows it counts for.
        why: Why that is fewer; empty when it is not.
    """

    rows: int
    counts: int
    why: str = ""


def cap_of(config: Config, first: Mapping[str, int]) -> int | None:
    """Most rows that a client counts for; None without a cap.

    Args:
        config: The run. Under differential privacy weights are at most 1 already, and a cap that follows other clients'
            rows would let one client change what others count for, which its noise does not hide.
        first: Rows that every client of the run named when it first joined.
    """
    limit = config.round.max_rows
    if isinstance(limit, int):
        return limit
    if limit == "off" or config.privacy.fixed_examples is not None or not first:
        return None
    return max(1, TIMES * median_low(first.values()))


def counts_of(config: Config, first: Mapping[str, int], now: Mapping[str, int]) -> dict[str, Count]:
    """What clients count for.

    Args:
        config: The run.
        first: Rows that every client of the run named when it first joined.
        now: Rows that the clients that are present name.

    Returns:
        By client.
    """
    cap = cap_of(config, first)
    times = f"{TIMES} times the median" if config.round.max_rows == "auto" else "the most"
    privacy = config.privacy
    own = privacy.secure_aggregation and privacy.fixed_examples is not None  # clients take no number from us then
    out = {}
    for client, rows in now.items():
        counts, why = rows if own else min(rows, first[client]), ""
        if counts < rows:
            why = f"it first joined with {counts:,}"
        if cap is not None and counts > cap:
            counts, why = cap, f"{cap:,} are {times} (round.max_rows)"
        out[client] = Count(rows, counts, why)
    return out
