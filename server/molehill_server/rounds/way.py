"""How a round is done, and what comes of it: what the loop asks of a plain and of a masked round alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from molehill_server.privacy.accountant import Ledger
from molehill_server.records import Global
from molehill_server.rounds.notes import Notes


class Done(NamedTuple):
    """What came of a round."""

    after: Global
    report: Mapping[str, float]
    notes: Notes
    ledger: Ledger | None


class Way(Protocol):
    """How a round is done, attempt by attempt."""

    anew: bool
    """Whether what was uploaded in an attempt that was cut short is worthless, and the next needs another number."""

    def resumed(self, glob: Global, number: int) -> Done | None:
        """What comes of what an earlier process has left of a round; None when that is nothing."""
        ...

    def attempt(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: Notes, ledger: Ledger | None
    ) -> Done:
        """Do a round with the clients that ``notes`` names as selected.

        Args:
            glob: The model as clients have it.
            number: The round.
            attempt: At it, from 0.
            nodes: Node of every client that is connected.
            notes: Filled in.
            ledger: What will have been spent of the privacy budget.

        Raises:
            BelowQuorum: Too few answered; the round may be tried again.
        """
        ...

    def forget(self) -> None:
        """Drop what is kept of an attempt: its round is committed, or it failed."""
        ...
