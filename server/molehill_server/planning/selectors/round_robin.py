"""Select in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molehill.registry import register


@dataclass(frozen=True)
class RoundRobinParams:
    """Parameters of ``round_robin``.

    Attributes:
        count: Clients per round.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be 1 or more, not {self.count}")


@register("client_selector", "round_robin", params=RoundRobinParams, paper="house")
def round_robin(params: RoundRobinParams, pool: Sequence[str], round_number: int, attempt: int, seed: int) -> list[str]:
    """The next ``count`` clients in the order of their ids; a retry moves on by one turn."""
    del seed
    start = (round_number - 1 + attempt) * params.count
    chosen = {pool[(start + turn) % len(pool)] for turn in range(min(params.count, len(pool)))}
    return [client for client in pool if client in chosen]
