"""How the round loop talks to clients, and when it stops waiting for them.

The loop knows neither Flower nor a network: it pushes small JSON texts to nodes through a `Transport` and pulls the
replies. Time is the transport's, so that a simulation can let a straggler be late without anybody waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

POLL = 1.0  # seconds between two looks for replies


@dataclass(frozen=True)
class Outgoing:
    """A message to one node.

    Attributes:
        node: The transport's number of the node.
        kind: ``query.hello``, ``train``, ``train.baseline`` or ``evaluate``; for secure aggregation ``query.keys``,
            ``query.shares``, ``query.agree`` and ``query.unmask``.
        group: Round and attempt, ``"3.0"``; to agree and to unmask also which try, ``"3.0.unmask.0"``.
        text: JSON of the plan, of the introduction, or of a question of secure aggregation.
        ttl: Seconds after which the message is worthless.
    """

    node: int
    kind: str
    group: str
    text: str
    ttl: float


@dataclass(frozen=True)
class Incoming:
    """A reply.

    Attributes:
        reply_to: Id of the message it answers.
        text: JSON of the reply; None when the client failed.
        error: Why the client failed; empty when it did not.
        lost: The transport's word that the client will never answer, for example since its node is gone.
    """

    reply_to: str
    text: str | None
    error: str = ""
    lost: bool = False


class Transport(Protocol):
    """Carries messages to nodes and replies back."""

    def nodes(self) -> list[int]:
        """The nodes that are connected now."""
        ...

    def name(self, node: int) -> str:
        """The name that a node has proved to have; empty where nodes prove none."""
        ...

    def visit(self, node: int) -> str:
        """What tells this stay of a node from an earlier one; always the same where none comes back."""
        ...

    def push(self, message: Outgoing) -> str | None:
        """Send a message; return its id, or None when the node cannot be reached."""
        ...

    def pull(self, ids: AbstractSet[str]) -> list[Incoming]:
        """Return the replies to some of these messages that have arrived and were not returned before."""
        ...

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        ...


@dataclass(frozen=True)
class Patience:
    """When a round closes.

    Attributes:
        deadline: Seconds after which it closes in any case.
        quorum: Accepted replies from which on the rest is given only ``grace`` more.
        grace: Seconds to wait for the rest once the quorum is there.
    """

    deadline: float
    quorum: int
    grace: float


class Collection:
    """Sends messages and yields the replies until all are in or patience is at an end.

    The one who iterates calls `accept` for every reply that counts towards the quorum.

    Args:
        transport: Carries the messages.
        messages: The messages, with the client each is for.
        patience: When to stop.
        late: Ids of messages of earlier rounds whose replies came too late or not yet; this set is kept up to date.
    """

    def __init__(
        self, transport: Transport, messages: Sequence[tuple[str, Outgoing]], patience: Patience, late: set[str]
    ) -> None:
        self._transport = transport
        self._patience = patience
        self._late = late
        self._accepted = 0
        self._start = transport.now()
        self.unreached: list[str] = []
        self.overdue: list[Incoming] = []
        self._pending: dict[str, str] = {}
        for client, message in messages:
            reference = transport.push(message)
            if reference is None:
                self.unreached.append(client)
            else:
                self._pending[reference] = client

    @property
    def missing(self) -> list[str]:
        """Clients that could not be reached, were lost or have not answered."""
        return self.unreached + list(self._pending.values())

    def accept(self) -> None:
        """Count the reply that was yielded last towards the quorum."""
        self._accepted += 1

    def __iter__(self) -> Iterator[tuple[str, Incoming]]:
        """Yield ``(client, reply)`` as they come in; what is still out at the end is late."""
        reached: float | None = None
        while self._pending:
            replies = self._pull()
            yield from replies
            now = self._transport.now()
            if reached is None and self._accepted >= self._patience.quorum:
                reached = now
            left = self._patience.deadline - (now - self._start)
            if reached is not None:
                left = min(left, self._patience.grace - (now - reached))
            if replies:
                continue  # more may be there already; only waiting costs patience
            if left <= 0:
                break
            self._transport.wait(min(POLL, left))
        self._late.update(self._pending)

    def _pull(self) -> list[tuple[str, Incoming]]:
        wanted = self._pending.keys() | self._late if self._late else self._pending.keys()
        replies = []
        for reply in self._transport.pull(wanted):
            if reply.reply_to in self._pending:
                client = self._pending.pop(reply.reply_to)
                if reply.lost:
                    self.unreached.append(client)
                else:
                    replies.append((client, reply))
            else:
                self._late.discard(reply.reply_to)
                self.overdue.append(reply)
        return replies
