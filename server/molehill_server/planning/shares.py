"""What a policy decides: which tensors are shared, personal or frozen in a round."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.plan import Scope
from molehill.wire.keys import KINDS


@dataclass(frozen=True)
class Shares:
    """The scope of every kind of tensor.

    Attributes:
        A: Down-projections ``[r, d_in]`` of the experts.
        B: Up-projections ``[d_out, r]`` of the experts.
        dense: Tensors of experts that are not low-rank.
        gate: Routers; None leaves the choice to ``personal.gate``.
        head: Classification head; None leaves the choice to ``personal.head``.
        other: Tensors of any other kind.
        ranks: Highest rank per expert of every client in turn; empty for the full rank everywhere.
        ks: Experts per token of every client in turn; empty for what the selector says.
    """

    A: Scope = "shared"
    B: Scope = "shared"
    dense: Scope = "shared"
    gate: Scope | None = None
    head: Scope | None = None
    other: Scope = "shared"
    ranks: tuple[int, ...] = ()
    ks: tuple[int, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether all clients send tensors of the same names and shapes."""
        return not self.ranks

    def of(self, kind: str) -> Scope | None:
        """The scope of a kind of tensor, see `molehill.wire.keys.Key.kind`; None leaves it to ``personal``."""
        found: Scope | None = getattr(self, kind) if kind in KINDS else self.other
        return found
