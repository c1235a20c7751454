"""Select everyone."""

from __future__ import annotations

from collections.abc import Sequence

from molehill.registry import register


@register("client_selector", "all", paper="house")
def everyone(pool: Sequence[str], round_number: int, attempt: int, seed: int) -> list[str]:
    """Every client that is reachable, in every round."""
    del round_number, attempt, seed
    return list(pool)
