"""What is noted down while a round goes on, and how it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from molehill.errors import FederationError
from molehill.wire.tree import Tree
from molehill_server.counts import Count
from molehill_server.norms import RoundNorms

BACK = "Mend what kept the others away, then resume."


class BelowQuorum(Exception):  # noqa: N818 - not an error yet: the round may be tried again
    """Fewer clients answered than are needed.

    Args:
        need: How many are.
        why: What was missing, where it was no usable update.
    """

    def __init__(self, need: int, why: str = "") -> None:
        super().__init__(need)
        self.need, self.why = need, why


class UnusableModelError(Exception):
    """A client says that the model it was sent cannot be trained."""


@dataclass
class Notes:
    """What is noted down while a round goes on; its bytes are all that came and went, also for nothing."""

    selected: list[str]
    counts: Mapping[str, Count]  # rows of the clients that are present
    norms: RoundNorms = field(default_factory=lambda: RoundNorms(follows=False))
    accepted: list[str] = field(default_factory=list)
    deltas: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    seen: dict[str, Tree] = field(default_factory=dict)  # of every accepted update, what an assignment looks at
    figures: Mapping[str, float] | None = None  # means over rows, where no client tells its own
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def loss(self) -> float | None:
        """Mean training loss over rows; None when nobody trained."""
        return self._mean(self.losses) if self.figures is None else self.figures["loss"]

    @property
    def routing(self) -> dict[str, float | None]:
        """Mean of every routing loss over the rows of the clients that name it."""
        if self.figures is not None:
            return {name: figure for name, figure in sorted(self.figures.items()) if name != "loss"}
        names = sorted({name for metrics in self.metrics.values() for name in metrics})
        return {name: self._mean({c: m[name] for c, m in self.metrics.items() if name in m}) for name in names}

    @property
    def absences(self) -> str:
        """Who did not answer, and why others do not count."""
        parts = [f"no answer from {', '.join(self.missing)}"] if self.missing else []
        return "; ".join([*parts, *(f"{client}: {reason}" for client, reason in self.quarantined.items())])

    def failure(self, number: int, need: int) -> FederationError:
        """Say who answered in a round that failed, and why the others did not count."""
        parts = [f"round {number} is below its quorum: {len(self.accepted)} of {len(self.selected)} clients answered"]
        parts.append(f"with a usable update, {need} are needed")
        parts += filter(None, [self.absences])
        if not self.unusable:
            return FederationError("; ".join(parts), mend=BACK)
        client, reason = next(iter(self.unusable.items()))
        parts.append(
            f"{', '.join(self.unusable)} cannot train the model they were sent ({client}: {reason.rstrip('.')})"
        )
        mend = (
            f"What was merged in round {number - 1} may have ruined the model: compare the norms in the report, and "
            "begin anew with a lower round.norm_bound or a rule against bad clients."
            if number > 1
            else "Lower train.lr, or set base.precision to fp32."
        )
        return FederationError("; ".join(parts), mend=mend)

    def _mean(self, values: Mapping[str, float]) -> float | None:
        rows = sum(self.examples[client] for client in values)
        return sum(value * self.examples[client] for client, value in values.items()) / rows if rows else None
