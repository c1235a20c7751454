"""All clients in this process: the base model in memory once, no daemon, no network, no serialisation.

A message is executed when somebody pulls replies, one message per pull: progress is live, a reply is used before the
next client starts, and Ctrl-C stops between two clients. Time is the grid's own, so a simulated straggler is late
without anybody waiting and two runs see the same order of events.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from molehill.errors import MolehillError
from molehill_simulation.flower import (
    Context,
    Grid,
    Message,
    RecordDict,
    Run,
    RunConfig,
    context_of,
    error_reply,
    identify,
    isolated,
    set_identity,
)

FIRST_NODE = 2  # 0 and 1 mean the server to Flower

_log = logging.getLogger(__name__)


class NoReply(Exception):  # noqa: N818 - what happened to the client, not a mistake
    """Raised in place of a reply: the client has vanished and nothing will ever arrive."""


class LocalGrid(Grid):
    """Runs a ClientApp for every message, in order.

    Clients answer at once by the grid's clock, unless they call `late` while they run. A ClientApp that raises
    becomes an error reply, as on Flower's other grids; KeyboardInterrupt passes through.

    Args:
        client_app: The ClientApp, or any function of its form.
        nodes: Number of clients; each finds ``partition-id`` and ``num-partitions`` in its node configuration.
        run_config: Run configuration of the clients.
        run_id: Number of the run.
    """

    def __init__(
        self, client_app: Callable[[Message, Context], Message], nodes: int, run_config: RunConfig, run_id: int = 1
    ) -> None:
        set_identity(run_id)
        self._run = Run.create_empty(run_id)
        self.client_app = client_app
        self._nodes = nodes
        self._run_config = run_config
        self._contexts: dict[int, Context] = {}  # only of nodes that keep something in them
        self._queue: deque[Message] = deque()
        self._replies: dict[str, tuple[float, Message]] = {}  # by id of the message: when it is due, and the reply
        self._made = 0
        self._time = 0.0
        self._delay = 0.0

    # Time

    def now(self) -> float:
        """Seconds since the grid was made, by its own clock."""
        return self._time

    def wait(self, seconds: float) -> None:
        """Move the clock; nobody sleeps."""
        self._time += seconds

    def late(self, seconds: float) -> None:
        """Called by a client while it runs: its reply arrives so much later."""
        self._delay += seconds

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
        while not (due := self._due(wanted)):
            message = self._next(wanted)
            if message is None:
                break
            self._execute(message)
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

    def _next(self, wanted: AbstractSet[str]) -> Message | None:
        for _ in range(len(self._queue)):
            message = self._queue.popleft()
            if message.metadata.message_id in wanted:
                return message
            self._queue.append(message)
        return None

    def _execute(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        context = self._contexts.get(node) or context_of(
            self._run.run_id,
            node,
            {"partition-id": node - FIRST_NODE, "num-partitions": self._nodes},
            dict(self._run_config),
        )
        self._delay = 0.0
        try:
            reply = self.client_app(isolated(message), context)
        except NoReply:
            return
        except MolehillError as error:
            reply = error_reply(str(error), message)
        except Exception as error:  # noqa: BLE001 - whatever a client does wrong is a reply to the server
            _log.debug("client %d failed", node, exc_info=error)
            reply = error_reply(f"{type(error).__name__}: {error}", message)
        if context.state:
            self._contexts[node] = context
        self._replies[message.metadata.message_id] = (self._time + self._delay, identify(reply, self._name()))

    def _name(self) -> str:
        self._made += 1
        return f"{self._run.run_id}-{self._made}"
