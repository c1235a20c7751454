"""Select every client by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from molehill.registry import register


@dataclass(frozen=True)
class PoissonParams:
    """Parameters of ``poisson``.

    Attributes:
        rate: Probability with which a client takes part in a round, above 0 and at most 1.
    """

    rate: float = 0.5
    sampling: ClassVar[Literal["fixed", "poisson"]] = "poisson"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {self.rate}")


@register(
    "client_selector",
    "poisson",
    params=PoissonParams,
    paper="McMahan et al. 2018, Learning Differentially Private Recurrent Language Models",
    url="https://arxiv.org/abs/1710.06963",
)
def poisson(params: PoissonParams, pool: Sequence[str], round_number: int, attempt: int, seed: int) -> list[str]:
    """A coin of its own for every client in every round; nobody may come up.

    What a coin shows depends on nothing but seed, round and client: not on who else is there, and a retry asks the
    same clients again.
    """
    del attempt
    below = params.rate * 2**64

    def coin(client: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{round_number}/{client}".encode(), digest_size=8).digest())

    return [client for client in pool if coin(client) < below]
