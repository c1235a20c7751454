"""Where clients act: a ClientApp called in this process, alone or for several clients at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from molehill import files
from molehill.errors import MolehillError
from molehill_simulation import pulse
from molehill_simulation.flower import Context, Message, RunConfig, context_of, error_reply, isolated

FIRST_NODE = 2  # 0 and 1 mean the server to Flower

_log = logging.getLogger(__name__)


class NoReply(Exception):  # noqa: N818 - what happened to the client, not a mistake
    """Raised in place of a reply: the client has vanished and nothing will ever arrive."""


class Answer(NamedTuple):
    """What came of a message.

    Attributes:
        reply: The reply; None when there will never be one.
        delay: Seconds it is late.
    """

    reply: Message | None
    delay: float


@runtime_checkable
class Together(Protocol):
    """A ClientApp that can also serve several clients at once, which saves time."""

    def together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message | Exception]:
        """Yield, for every message in order, its reply or what a call for it alone would have raised.

        What it raises itself concerns all messages not yet answered; they are then called one by one.
        """
        ...


def call(
    app: Callable[[Message, Context], Message], messages: Sequence[Message], contexts: Sequence[Context]
) -> Iterator[Message | Exception]:
    """Call an app for several messages, at once when it can; yields each reply, or what was raised instead."""
    answered = 0
    if len(messages) > 1 and isinstance(app, Together):
        try:
            for outcome in app.together(messages, contexts):
                yield outcome
                answered += 1
        except Exception:  # noqa: BLE001 - one by one from here, so that it meets the client who caused it
            _log.debug("clients fail together, now one by one", exc_info=True)
    for message, context in zip(messages[answered:], contexts[answered:], strict=True):
        try:
            yield app(message, context)
        except Exception as error:  # noqa: BLE001 - whatever a client does wrong is a reply to the server
            yield error


class Stage:
    """Calls a ClientApp for messages.

    An exception becomes an error reply, as on Flower's grids; KeyboardInterrupt passes through, and so does a full
    disk, which is this machine's failure: to go on without its clients would change what the run measures.

    Args:
        client_app: The ClientApp, or any function of its form.
        nodes: Number of clients; each finds ``partition-id`` and ``num-partitions`` in its node configuration.
        run_config: Run configuration of the clients.
        run_id: Number of the run.
    """

    def __init__(
        self, client_app: Callable[[Message, Context], Message], nodes: int, run_config: RunConfig, run_id: int
    ) -> None:
        self.client_app = client_app
        self._nodes = nodes
        self._run_config = run_config
        self._run_id = run_id
        self._contexts: dict[int, Context] = {}  # only of nodes that keep something in them
        self._delay = 0.0

    def late(self, seconds: float) -> None:
        """Called by a client while it runs: its reply arrives so much later."""
        self._delay += seconds

    def perform(self, messages: Sequence[Message]) -> list[Answer]:
        """Call the app, in order; several messages at once when it can.

        Returns:
            The answer to every message.

        Raises:
            DeployError: The disk is full.
        """
        pulse.begin()
        contexts = [self._context(message) for message in messages]
        outcomes = call(self.client_app, [isolated(message) for message in messages], contexts)
        answers = []
        for message, context in zip(messages, contexts, strict=True):
            self._delay = 0.0
            answers.append(self._answer(message, next(outcomes)))
            if context.state:
                self._contexts[message.metadata.dst_node_id] = context
        return answers

    def _answer(self, message: Message, outcome: Message | Exception) -> Answer:
        if isinstance(outcome, NoReply):
            return Answer(None, 0.0)
        if isinstance(outcome, MolehillError):
            return Answer(error_reply(str(outcome), message), self._delay)
        if isinstance(outcome, OSError) and files.is_full(outcome):
            with files.told("the run", Path()):
                raise outcome
        if isinstance(outcome, Exception):
            _log.debug("client %d failed", message.metadata.dst_node_id, exc_info=outcome)
            return Answer(error_reply(f"{type(outcome).__name__}: {outcome}", message), self._delay)
        return Answer(outcome, self._delay)

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        return self._contexts.get(node) or context_of(
            self._run_id,
            node,
            {"partition-id": node - FIRST_NODE, "num-partitions": self._nodes},
            dict(self._run_config),
        )
