"""All clients on this machine: the base model in memory once per process, no daemon and no network.

A message is executed when somebody pulls replies, one message (or group of messages) per pull: progress is live, a
reply is used before the next client starts, and Ctrl-C stops between two clients. Time is the grid's own, so a
simulated straggler is late without anybody waiting, and replies come in the order of the messages, whoever worked on
them: two runs see the same order of events.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Protocol

from molehill_simulation.flower import (
    Context,
    Grid,
    Message,
    RecordDict,
    Run,
    RunConfig,
    identify,
    set_identity,
)
from molehill_simulation.stage import FIRST_NODE, Answer, Stage


class Crew(Protocol):
    """Processes other than this one that call the ClientApp.

    ``ahead`` is how many groups of messages are worth handing over before the first is answered.
    """

    ahead: int

    def submit(self, messages: Sequence[Message]) -> Callable[[], list[Answer]]:
        """Have a group of messages executed; the result waits for the answers and returns them."""
        ...


class LocalGrid(Grid):
    """Runs a ClientApp for every message, in order.

    Clients answer at once by the grid's clock, unless they call `late` while they run. A ClientApp that raises
    becomes an error reply, as on Flower's other grids; KeyboardInterrupt passes through.

    Args:
        client_app: The ClientApp, or any function of its form.
        nodes: Number of clients; each finds ``partition-id`` and ``num-partitions`` in its node configuration.
        run_config: Run configuration of the clients.
        run_id: Number of the run.
        together: Most messages with a plan that are executed as one group.
        crew: Executes the messages in place of this process. What a client keeps in its context is then forgotten
            between two messages.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        nodes: int,
        run_config: RunConfig,
        run_id: int = 1,
        *,
        together: int = 1,
        crew: Crew | None = None,
    ) -> None:
        set_identity(run_id)
        self._run = Run.create_empty(run_id)
        self.stage = Stage(client_app, nodes, run_config, run_id)
        self._nodes = nodes
        self._together = together
        self._crew = crew
        self._running: deque[tuple[list[Message], Callable[[], list[Answer]]]] = deque()
        self._queue: deque[Message] = deque()
        self._replies: dict[str, tuple[float, Message]] = {}  # by id of the message: when it is due, and the reply
        self._made = 0
        self._time = 0.0

    # Time

    def now(self) -> float:
        """Seconds since the grid was made, by its own clock."""
        return self._time

    def wait(self, seconds: float) -> None:
        """Move the clock; nobody sleeps."""
        self._time += seconds

    def late(self, seconds: float) -> None:
        """Called by a client while it runs: its reply arrives so much later."""
        self.stage.late(seconds)

    # The interface of a grid

    def set_run(self, run: Run) -> None:
        """Say which run this grid is for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; `Message` itself does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes."""
        return range(FIRST_NODE, FIRST_NODE + self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they are executed when their replies are pulled.

        Args:
            messages: The messages.

        Returns:
            The id of every message, in order.
        """
        ids = []
        for message in messages:
            self._queue.append(identify(message, self._name()))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are due; executes messages until there is one, or none of these is left to execute."""
        wanted = message_ids if isinstance(message_ids, AbstractSet) else set(message_ids)
        while not (due := self._due(wanted)) and self._advance(wanted):
            pass
        return due

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and pull all replies that arrive within ``timeout`` seconds by the grid's clock."""
        pending = set(self.push_messages(messages))
        end = float("inf") if timeout is None else self._time + timeout
        replies: list[Message] = []
        while pending:
            arrived = list(self.pull_messages(pending))
            replies += arrived
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            if not arrived:  # all were executed, so the rest is late or lost
                moments = [self._replies[name][0] for name in pending if name in self._replies]
                if not moments or min(moments) > end:
                    break
                self._time = min(moments)
        return replies

    def _due(self, wanted: AbstractSet[str]) -> list[Message]:
        names = [name for name, (moment, _) in self._replies.items() if moment <= self._time and name in wanted]
        return [self._replies.pop(name)[1] for name in names]

    def _advance(self, wanted: AbstractSet[str]) -> bool:
        """Have the next messages executed; False when none of these is left."""
        ahead, submit = (1, self._call) if self._crew is None else (self._crew.ahead, self._crew.submit)
        while len(self._running) < ahead and (group := self._next(wanted)):
            self._running.append((group, submit(group)))
        if not self._running:
            return False
        group, answers = self._running.popleft()
        for message, (reply, delay) in zip(group, answers(), strict=True):
            if reply is not None:
                name = message.metadata.message_id
                self._replies[name] = (self._time + delay, identify(reply, self._name()))
        return True

    def _call(self, messages: Sequence[Message]) -> Callable[[], list[Answer]]:
        return lambda: self.stage.perform(messages)

    def _next(self, wanted: AbstractSet[str]) -> list[Message]:
        """Take the first of these messages from the queue, with its fair share of those it may be trained with."""
        found = next((message for message in self._queue if message.metadata.message_id in wanted), None)
        if found is None:
            return []
        group = [found]
        if self._together > 1 and not found.metadata.message_type.startswith("query"):
            kind = found.metadata.message_type
            fellows = (m for m in self._queue if m.metadata.message_id in wanted and m.metadata.message_type == kind)
            group = list(islice(fellows, self._together**2))  # of so many or more, a fair share is a full group
            group = group[: math.ceil(len(group) / math.ceil(len(group) / self._together))]
        for message in group:
            self._queue.remove(message)
        return group

    def _name(self) -> str:
        self._made += 1
        return f"{self._run.run_id}-{self._made}"
