"""How large a delta may be: by a fixed bound, or by what the others of its round and of the rounds before sent.

A rule `mean` follows one delta as far as it is long, so a bound far above what honest clients send protects nothing.
The automatic bound of a round is three times a median of norms: the running one of earlier rounds, or that of the round
itself where it is larger. While fewer than half of the clients lie, liars move neither above what honest clients send;
and when all send larger deltas than before, none of them is refused for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import TypeAlias

from molehill.plan import ClientPlan
from molehill.wire.tree import Layout
from molehill_server.planning.planner import expected

Medians: TypeAlias = Mapping[str, tuple[float, ...]]  # of the last rounds, oldest first, by digest of what was sent

TIMES = 3.0
_ROUNDS = 5  # whose medians count
_CROWD = 3  # deltas, of which one can be outvoted


@dataclass
class RoundNorms:
    """The norms of one round's deltas, and what they are held against.

    A delta is `held` while it is above what the rounds before allow: only when all of the round are in can it be told
    whether it is an outlier or all have grown. In a first round all are held, and of fewer than three deltas none is an
    outlier then. Deltas of a lower rank count as if they had the numbers they lack.

    Attributes:
        kind: What is sent; see `kind_of`.
        running: Running median of rounds of this kind; None when there is none.
        follows: Whether the round has an automatic bound; else all norms are only noted.
        found: Norm of every delta by client.
        scales: What the norm of a client counts times.
    """

    kind: str = ""
    running: float | None = None
    follows: bool = True
    found: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def safe(self, scale: float) -> float | None:
        """The norm up to which a client's delta is taken whatever the others send; None when there is none yet."""
        return TIMES * self.running / scale if self.follows and self.running is not None else None

    def held(self, client: str, size: float, scale: float) -> bool:
        """Note a norm; whether its delta must wait for the others."""
        self.found[client], self.scales[client] = size, scale
        safe = self.safe(scale)
        return self.follows and (safe is None or size > safe)

    @property
    def bound(self) -> float | None:
        """The bound by all that has come; None when there is none yet."""
        sizes = [size * self.scales[client] for client, size in self.found.items()]
        if not (self.follows and sizes):
            return None
        own = max(sizes) if self.running is None and len(sizes) < _CROWD else median_low(sizes)
        return TIMES * max(own, self.running or 0.0)

    def refusal(self, client: str) -> str:
        """Why the delta of a client is refused, now that all are in; empty when it is not."""
        bound, size, scale = self.bound, self.found[client], self.scales[client]
        if bound is None or size * scale <= bound:
            return ""
        return (
            f"its delta has norm {size:.3g}, above the bound of {bound / scale:.3g}, which is {TIMES:g} times a median "
            "of all norms (round.norm_bound)"
        )

    def median(self, accepted: Iterable[str]) -> float | None:
        """Median of the norms that were accepted, for the rounds that follow."""
        sizes = [self.found[client] * self.scales[client] for client in accepted if client in self.found]
        return median_low(sizes) if sizes else None


def kind_of(plan: ClientPlan, model: Layout) -> str:
    """What tells rounds whose norms compare: the digest of what a client of full rank sends.

    Policies that take turns (RoLoRA) have a running median for each.
    """
    return expected(plan.model_copy(update={"rank": None}), model).digest


def scale_of(plan: ClientPlan, model: Layout) -> float:
    """What the norm of a client's delta counts times: above 1 for a lower rank, which has fewer numbers to change."""
    if plan.rank is None:
        return 1.0
    own, full = expected(plan, model).size, expected(plan.model_copy(update={"rank": None}), model).size
    return math.sqrt(full / own) if own else 1.0


def running(medians: Sequence[float]) -> float | None:
    """The running median; None when no round has been yet."""
    return median_low(medians) if medians else None


def later(medians: Medians, kind: str, median: float | None) -> Medians:
    """The medians after one more round of a kind."""
    if median is None:
        return medians
    return {**medians, kind: (*medians.get(kind, ()), median)[-_ROUNDS:]}
