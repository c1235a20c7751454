"""The simulation's only door to Flower: its types, messages with an id, and its Ray engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Flower and Ray read these once, when they are imported: a simulation talks to nobody.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SERVER_NODE",
    "ClientApp",
    "ConfigRecord",
    "Configured",
    "Context",
    "Grid",
    "Message",
    "RecordDict",
    "Run",
    "RunConfig",
    "ServerApp",
    "configured",
    "context_of",
    "error_reply",
    "identify",
    "isolated",
    "ray_engine",
    "set_identity",
]

RunConfig = dict[str, bool | float | int | str]

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
    records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {}
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            records[name] = ArrayRecord(dict(record))
        elif isinstance(record, MetricRecord):
            records[name] = MetricRecord({key: _own(value) for key, value in record.items()})
        else:
            records[name] = ConfigRecord({key: _own(value) for key, value in record.items()})
    copy = Message(RecordDict(records), message.metadata.dst_node_id, message.metadata.message_type)
    copy.__dict__["_metadata"] = message.metadata
    return copy


def error_reply(reason: str, message: Message) -> Message:
    """The reply that Flower makes when a ClientApp raises."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class Configured(ClientApp):
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
        context.run_config = dict(self._run_config)
        return self._app(message, context)


def configured(app: ServerApp, run_config: RunConfig) -> ServerApp:
    """A ServerApp that is given a run configuration."""
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = dict(run_config)
        app(grid, context)

    return outer


def ray_engine(server_app: ServerApp, client_app: ClientApp, nodes: int, resources: Mapping[str, float]) -> None:
    """Run both apps on Flower's Ray engine.

    Args:
        server_app: Runs in a thread of this process.
        client_app: Runs in Ray actors; it is pickled.
        nodes: Number of clients.
        resources: ``num_cpus`` and ``num_gpus`` of one client.
    """
    with _without_deprecation():
        run_simulation(server_app, client_app, nodes, backend_config={"client_resources": dict(resources)})


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


def _own(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
