"""The event stream of a run: one JSON object a line in ``metrics.jsonl``, and to whoever listens in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molehill.errors import DataError

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

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event with the time of day and pass it on."""
        record = {"event": event, "time": time.time(), **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for listener in (*self._own, *_listeners):
            listener(record)


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
            event = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and not line.endswith("\n"):
                break
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise DataError("not an event of a run", where=f"{path}:{number}", mend="Was the file edited?")
        events.append(event)
    return events


def rewind(path: Path, round_number: int) -> None:
    """Drop what was written after round ``round_number`` ended (after the start for 0), atomically.

    A resumed run writes those events again.
    """
    if not path.exists():
        return
    kept = []
    last = ("round", round_number) if round_number else ("start", None)
    for event in read(path):
        kept.append(event)
        if (event["event"], event.get("round")) == last:
            break
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
    scratch.replace(path)
