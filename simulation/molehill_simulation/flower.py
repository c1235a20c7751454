"""The simulation's only door to Flower: its types, messages with an id, and its Ray engine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Flower and Ray read these once, when they are imported: a simulation talks to nobody.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions of Ray do; else it warns

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from molehill import surroundings
from molehill.errors import FederationError

__all__ = [
    "SERVER_NODE",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Grid",
    "Message",
    "RecordDict",
    "Run",
    "RunConfig",
    "ServerApp",
    "context_of",
    "error_reply",
    "identify",
    "isolated",
    "lost_reply",
    "pack",
    "ray_engine",
    "set_identity",
    "unpack",
]

RunConfig = dict[str, bool | float | int | str]

_RAY = "ray/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store"  # Ray's longest path of a socket

SERVER_NODE = 1  # the node id that Flower gives to whoever runs the ServerApp


def set_identity(run_id: int) -> None:
    """Say that this process runs the ServerApp of a run; Flower asks when a message is made."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE


def identify(message: Message, name: str) -> Message:
    """Give a message its id, as every Flower grid does."""
    message.metadata.__dict__["_message_id"] = name
    return message


def context_of(run_id: int, node: int, node_config: RunConfig, run_config: RunConfig) -> Context:
    """A fresh context."""
    return Context(run_id, node, node_config, RecordDict(), run_config)


def isolated(message: Message) -> Message:
    """The message with records of its own, so that a receiver cannot change what another one receives.

    Arrays hold immutable bytes and are not copied.
    """
    content = message.content.copy()
    content.__dict__["_data"] = {name: _own(record) for name, record in content.items()}  # they were checked before
    mine = Message.__new__(Message)  # the constructor would make other metadata
    mine.__dict__.update(message.__dict__, _content=content)
    return mine


def pack(message: Message) -> bytes:
    """A message in Flower's own encoding."""
    return bytes(message_to_proto(message).SerializeToString())


def unpack(data: bytes) -> Message:
    """The message that `pack` encoded."""
    return message_from_proto(ProtoMessage.FromString(data))


def error_reply(reason: str, message: Message) -> Message:
    """The reply that Flower makes when a ClientApp raises."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def lost_reply(reason: str, message: Message) -> Message:
    """The reply that Flower makes in place of a node that is gone."""
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)


class _Configured(ClientApp):
    """A ClientApp that is given a run configuration; Flower's own engines start it with an empty one.

    Args:
        app: The ClientApp.
        run_config: The run configuration.
    """

    def __init__(self, app: ClientApp, run_config: RunConfig) -> None:
        super().__init__()
        self._app = app
        self._run_config = run_config

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the ClientApp."""
        # A context of its own with the node's state: Flower refuses changes to the one it hands out.
        inner = Context(context.run_id, context.node_id, context.node_config, context.state, dict(self._run_config))
        return self._app(message, inner)


def ray_engine(
    server_app: ServerApp,
    client_app: ClientApp,
    nodes: int,
    server_config: RunConfig,
    client_config: RunConfig,
    resources: Mapping[str, float],
) -> None:
    """Run both apps on Flower's Ray engine.

    Args:
        server_app: Runs in a thread of this process.
        client_app: Runs in Ray actors; it is pickled.
        nodes: Number of clients.
        server_config: Run configuration of the server.
        client_config: Run configuration of the clients.
        resources: ``num_cpus`` and ``num_gpus`` of one client.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415 - takes a second, and most runs do without

    stop = threading.Event()
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = dict(server_config)
        server_app(_Stoppable(grid, stop), context)

    try:
        with _without_deprecation(), _place() as place:
            run_simulation(
                outer,
                _Configured(client_app, client_config),
                nodes,
                backend_config={"client_resources": dict(resources), "init_args": place},
            )
    finally:
        stop.set()


@contextmanager
def _place() -> Iterator[dict[str, Any]]:
    """Another place for Ray's sockets, where the one that it would take has too long a path for them."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "")
    if surroundings.is_short(folder, _RAY) or os.environ.get("RAY_ADDRESS"):
        yield {}
        return
    with surroundings.short_folder(_RAY) as short:
        yield {"_temp_dir": str(short)}


class _Stoppable(Grid):
    """A grid that stops its ServerApp when the engine is gone, which would else wait for replies in its thread."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid = grid
        self._stop = stop

    def _running(self) -> Grid:
        if self._stop.is_set():
            raise FederationError("the simulation engine has stopped")
        return self._grid

    def set_run(self, run: Run) -> None:
        self._running().set_run(run)

    @property
    def run(self) -> Run:
        return self._running().run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._running().create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._running().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._running().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._running().pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._running().send_and_receive(messages, timeout=timeout)


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """Silence the one warning that `run_simulation` is deprecated.

    Its successor, ``flwr run``, starts a daemon and installs packages from the network for every run, which a
    simulation must not do. The version of flwr is pinned, so the function cannot vanish unnoticed.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not (str(record.msg).startswith("DEPRECATED FEATURE") and "run_simulation" in str(record.args))

    logger = logging.getLogger("flwr")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _own(record: ArrayRecord | ConfigRecord | MetricRecord) -> ArrayRecord | ConfigRecord | MetricRecord:
    own = record.copy()
    if not isinstance(own, ArrayRecord):
        own.__dict__["_data"] = {k: v.copy() if isinstance(v, list) else v for k, v in own.items()}
    return own
