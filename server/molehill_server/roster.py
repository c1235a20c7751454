"""Which client sits behind which node."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import ValidationError

from molehill import __version__
from molehill.errors import FederationError
from molehill.plan import Hello
from molehill_server.events import EventLog
from molehill_server.transport import POLL, Collection, Outgoing, Patience, Transport

_MOST_ROWS = 10**9


class Roster:
    """Asks nodes who they are and remembers it.

    Args:
        transport: Reaches the nodes.
        log: Told about nodes that are refused.
        introduction: What nodes are told when they are asked.
        wanted: Nodes to wait for at the start.
    """

    def __init__(self, transport: Transport, log: EventLog, introduction: str = "", wanted: int = 1) -> None:
        self._transport = transport
        self._log = log
        self._introduction = introduction
        self._wanted = wanted
        self._hellos: dict[int, Hello] = {}
        self._visits: dict[int, str] = {}  # the visit in which a node said hello
        self._refused: dict[str, str] = {}  # last reason by client

    def gather(self, deadline: float, quorum: float, grace: float) -> dict[str, int]:
        """Wait for the first nodes and ask them all.

        Args:
            deadline: Seconds to wait at most.
            quorum: Part of the nodes whose answer is enough.
            grace: Seconds to wait for the others then.

        Returns:
            The node of every client, sorted by client id.

        Raises:
            FederationError: No node came, or none answered.
        """
        end = self._transport.now() + deadline
        while (come := len(self._transport.nodes())) < self._wanted:
            if self._transport.now() >= end:
                raise FederationError(
                    f"{come or 'no'} client{'s'[: come > 1]} connected within {deadline:g} s"
                    + (f", {self._wanted} are wanted" if self._wanted > 1 else ""),
                    mend="Start the clients first.",
                )
            self._transport.wait(POLL)
        count = math.ceil(quorum * len(self._transport.nodes()))
        reasons = self._ask(Patience(deadline, count, grace))
        if not self._hellos:
            raise FederationError(f"no client is ready: {'; '.join(reasons) or 'none answered'}")
        return self.present()

    def refresh(self, seconds: float) -> dict[str, int]:
        """Like `gather`, for the nodes that came since the last time; waits for them at most ``seconds``.

        A node that was away is asked again: it may have been started anew with other rows.
        """
        self._ask(Patience(seconds, 1, seconds))
        return self.present()

    def present(self) -> dict[str, int]:
        """The node of every client that is connected, sorted by client id."""
        clients: dict[str, int] = {}
        for node in self._transport.nodes():
            hello = self._hellos.get(node)
            if hello is None:
                continue
            if hello.client in clients:
                self._refuse(hello.client, f"a second node says it is {hello.client!r}")
                continue
            clients[hello.client] = node
        return dict(sorted(clients.items()))

    def rows(self, nodes: Mapping[str, int]) -> dict[str, int]:
        """Training rows that every client named when it joined, by client."""
        return {client: self._hellos[node].n_train for client, node in nodes.items()}

    def hello(self, node: int) -> Hello:
        """What a node that is present said about itself."""
        return self._hellos[node]

    def _ask(self, patience: Patience) -> list[str]:
        visits = {node: self._transport.visit(node) for node in self._transport.nodes()}
        for known in list(self._hellos):
            if visits.get(known) != self._visits[known]:
                del self._hellos[known]
        unknown = [node for node in visits if node not in self._hellos]
        messages = [
            (str(node), Outgoing(node, "query.hello", "0.0", self._introduction, patience.deadline)) for node in unknown
        ]
        collection = Collection(self._transport, messages, patience, set())
        reasons = []
        for node, reply in collection:
            name = self._transport.name(int(node))
            try:
                hello = Hello.model_validate_json(reply.text or "")
            except ValidationError as error:
                reason = reply.error or f"malformed hello ({error.errors()[0]['msg']})"
            else:
                reason = self._objection(int(node), hello)
                name = name or hello.client  # of a node that proves none, the name that it gives
            if reason:
                # Flower's numbers mean nothing to anybody; they stand only where nodes prove no name, in a simulation.
                reasons.append(f"{name or f'node {node}'}: {reason}")
                self._refuse(name, reasons[-1])
                continue
            self._hellos[int(node)] = hello
            self._visits[int(node)] = visits[int(node)]
            collection.accept()
        return reasons

    def _refuse(self, client: str, reason: str) -> None:
        """Note down why a node cannot take part, once."""
        if self._refused.get(client) != reason:
            self._refused[client] = reason
            self._log.emit("refused", client=client, reason=reason)

    def _objection(self, node: int, hello: Hello) -> str:
        """Why a node cannot take part, in words; empty when it can."""
        proved = self._transport.name(node)
        if proved and hello.client != proved:
            return f"it says it is {hello.client!r}, and its certificate says {proved!r}"
        if hello.n_train > _MOST_ROWS:
            return f"it says it has {hello.n_train:,} training rows, which no machine trains on"
        if max(hello.n_test, hello.aside, hello.cut, hello.lost, hello.unlearnt) > _MOST_ROWS:
            return f"it says that more than {_MOST_ROWS:,} rows are held out, set aside, cut, lost or not learnt"
        if hello.version != __version__:
            return f"it runs Molehill {hello.version}, this is {__version__}. Install the same version on both."
        return ""
