"""The server's only door to Flower: a `Grid` as a `Transport`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Protocol, cast, runtime_checkable

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects

from molehill_server.transport import Incoming, Outgoing

__all__ = ["Context", "Grid", "GridTransport", "ServerApp"]

# What Flower itself answers in place of a client that will not.
_LOST = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
_TRIES = 10  # looks, a second apart, for the parts of a reply; a node sends them right after it has announced it


@runtime_checkable
class Clock(Protocol):
    """A grid that keeps its own time, as a simulation does."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        ...


class WallClock:
    """The time of this machine."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class GridTransport:
    """Carries the round loop's messages over any Flower grid.

    Args:
        grid: In this process, of a simulation engine, or of a SuperLink.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes: dict[int, tuple[str, str]] = {}  # name, and since when it is connected
        self._clock: Clock = grid if isinstance(grid, Clock) else WallClock()
        module = vars(sys.modules[type(grid).__module__])
        if "pull_objects" in module:  # the grid of a SuperLink, whose nodes may say what they like
            module["pull_objects"] = _parts

    def nodes(self) -> list[int]:
        """The nodes that are connected now."""
        self._nodes = {info.node_id: (info.name, info.last_activated_at) for info in self._grid.get_nodes()}
        return list(self._nodes)

    def name(self, node: int) -> str:
        """The name a node was registered with; empty in a simulation."""
        return self._nodes.get(node, ("", ""))[0]

    def visit(self, node: int) -> str:
        """When a node was started, or came back; empty in a simulation."""
        return self._nodes.get(node, ("", ""))[1]

    def push(self, message: Outgoing) -> str | None:
        """Send a message; return its id, or None when the grid does not take it."""
        content = RecordDict({"plan": ConfigRecord({"json": message.text})} if message.text else {})
        flower = Message(content, message.node, message.kind, ttl=message.ttl, group_id=message.group)
        # One at a time: some grids leave a refused message out of the ids they return, others return None for it.
        ids = list(self._grid.push_messages([flower]))
        return ids[0] if ids and ids[0] else None

    def pull(self, ids: AbstractSet[str]) -> list[Incoming]:
        """Return replies that have arrived."""
        # A reply is known by the message it answers: errors that Flower makes itself do not come from the node.
        return [Incoming(reply.metadata.reply_to_message_id, *_read(reply)) for reply in self._grid.pull_messages(ids)]

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return self._clock.now()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self._clock.wait(seconds)


def _parts(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """The parts of a reply, the reply itself last, in place of Flower's `pull_objects`.

    That one waits for minutes for a part that a node has announced and never sends, and what cannot be put together
    afterwards ends the process. Here both mean that the reply is lost.

    Raises:
        ObjectPullError: One has not come, or they are no reply.
    """
    found = pull_objects(object_ids, pull_object_fn, max_tries_per_object=_TRIES, backoff_cap=1.0)
    try:
        _read(cast("Message", inflate_object_from_contents(object_ids[-1], dict(found))))
    except Exception as error:  # the parsers below raise anything for what a node made up
        raise ObjectPullError(object_ids[-1], "it is no reply") from error
    return found


def _read(reply: Message) -> tuple[str | None, str, bool]:
    if reply.has_error():
        reason = reply.error.reason or f"failed with code {reply.error.code}"
        return None, reason, reply.error.code in _LOST
    record = reply.content.get("reply")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    return (text, "", False) if isinstance(text, str) else (None, "its reply holds no JSON", False)
