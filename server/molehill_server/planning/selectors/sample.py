"""Select a random part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from molehill.registry import register


@dataclass(frozen=True)
class RandomParams:
    """Parameters of ``random``.

    Attributes:
        fraction: Part of the reachable clients, above 0 and at most 1.
        at_least: Fewest clients, as far as there are so many.
    """

    fraction: float = 0.5
    at_least: int = 1
    sampling: ClassVar[Literal["fixed", "poisson"]] = "fixed"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if self.at_least < 1:
            raise ValueError(f"at_least must be 1 or more, not {self.at_least}")


@register(
    "client_selector",
    "random",
    params=RandomParams,
    paper="McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data",
    url="https://arxiv.org/abs/1602.05629",
)
def random(params: RandomParams, pool: Sequence[str], round_number: int, attempt: int, seed: int) -> list[str]:
    """A fresh uniform sample without replacement in every round."""
    count = min(len(pool), max(params.at_least, math.ceil(params.fraction * len(pool))))
    chosen = np.random.default_rng([seed, round_number, attempt]).choice(len(pool), size=count, replace=False)
    return [pool[index] for index in sorted(chosen)]
