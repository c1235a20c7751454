"""Who takes part: who is connected, what each counts for, and how many of them must answer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from molehill.config import Config
from molehill_server.counts import Count, counts_of
from molehill_server.roster import Roster
from molehill_server.rounds.record import Record
from molehill_server.transport import POLL, Transport


class Crew:
    """The clients of a run.

    Args:
        config: The run's configuration.
        transport: Reaches the nodes.
        roster: Knows which client sits behind which node.
        record: Told about clients that join.
        grace: Seconds to wait for the rest once there are enough.
        least: How many updates the aggregation rule needs.
    """

    def __init__(
        self, config: Config, transport: Transport, roster: Roster, record: Record, grace: float, least: int
    ) -> None:
        self._config = config
        self._transport = transport
        self.roster = roster
        self._record = record
        self._grace = grace
        self._least = least
        self._capped: dict[str, Count] = {}  # as it was last told

    def first(self) -> dict[str, int]:
        """The node of every client that comes at the start.

        Raises:
            FederationError: No node came, or none answered.
        """
        return self.roster.gather(self._config.round.deadline, self._config.round.quorum, self._grace)

    def present(self) -> dict[str, int]:
        """The node of every client that is connected; clients that are new join the run."""
        nodes = self.roster.refresh(self._grace)
        known = self._record.saved.clients
        self._record.join(self.roster.rows({client: node for client, node in nodes.items() if client not in known}))
        return nodes

    def gathered(self) -> dict[str, int]:
        """Who is connected once there are enough for a round, or when the round's deadline has passed."""
        end = self._transport.now() + self._config.round.deadline
        while len(nodes := self.present()) < self._config.round.min_clients and self._transport.now() < end:
            self._transport.wait(POLL)
        return nodes

    def counts(self, nodes: Mapping[str, int]) -> dict[str, Count]:
        """What every client that is present counts for; those that count for fewer rows than they name are told of."""
        now = self.roster.rows(nodes)
        counts = counts_of(self._config, {**now, **self._record.saved.rows}, now)
        for client, count in counts.items():
            if count.why and self._capped.get(client) != count:
                self._record.log.emit("capped", client=client, rows=count.rows, counts=count.counts, reason=count.why)
            self._capped[client] = count
        return counts

    def quorum(self, count: int) -> int:
        """How many of so many clients must send a usable update."""
        part = math.ceil(self._config.round.quorum * count)
        return max(self._least, self._config.round.min_clients, part)
