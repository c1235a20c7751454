"""The event stream of a run: one JSON object a line in ``metrics.jsonl``, and to whoever listens in this process."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from molehill.errors import DataError, ResumeError
from molehill.files import parse_json, sync

Listener = Callable[[dict[str, Any]], None]

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener`` with every event of any run in this process while the context is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Mark(NamedTuple):
    """How far an event file was written.

    Attributes:
        size: Bytes.
        sha256: Their digest (hex).
    """

    size: int
    sha256: str


EMPTY = Mark(0, hashlib.sha256().hexdigest())


class EventLog:
    """Appends events to a file.

    Args:
        path: The file; made when it is not there.
        listeners: Called with every event of this log.
    """

    def __init__(self, path: Path, *listeners: Listener) -> None:
        self._path = path
        self._own = listeners
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.read_bytes() if path.exists() else b""
        self._size, self._hash = len(known), hashlib.sha256(known)

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event with the time of day and pass it on."""
        record = {"event": event, "time": time.time(), **fields}
        line = (json.dumps(record) + "\n").encode()
        with self._path.open("ab") as file:
            file.write(line)
        self._size += len(line)
        self._hash.update(line)
        for listener in (*self._own, *_listeners):
            listener(record)

    def commit(self) -> Mark:
        """Have all that was written survive a crash, and say how far it goes."""
        if self._size:
            sync(self._path)
            sync(self._path.parent)
        return Mark(self._size, self._hash.hexdigest())


def read(path: Path) -> list[dict[str, Any]]:
    """Read an event file.

    Args:
        path: The file.

    Returns:
        All events; a last line that a crash cut off is left out.

    Raises:
        DataError: The file cannot be read, or a line is not an event.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read the run's events: {reason}", where=str(path)) from None
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = parse_json(line)
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise DataError("not an event of a run", where=f"{path}:{number}", mend="Was the file edited?")
        events.append(event)
    return events


def rewind(path: Path, mark: Mark) -> None:
    """Cut off what was written after a mark. A resumed run writes those events again.

    Raises:
        ResumeError: What was written before it is not there any more.
    """
    try:
        known = path.read_bytes()[: mark.size]
    except FileNotFoundError:
        known = b""
    if (len(known), hashlib.sha256(known).hexdigest()) != mark:
        raise ResumeError(
            f"the run's events were damaged since the last checkpoint ({len(known)} of {mark.size} bytes are there"
            f"{', changed' if len(known) == mark.size else ''}), and its summary and report would not be right",
            where=str(path),
            mend="Bring the file back, or start a new run in another folder.",
        )
    if mark.size:
        os.truncate(path, mark.size)
