"""Log records as JSON: one object a line on standard error, for programs that read logs."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Hashable
from datetime import UTC, datetime
from typing import Any

from molehill.characters import harmless, survive

VARIABLE = "MOLEHILL_LOG_JSON"
_FIELDS = "molehill_fields"
_KEPT = 1024  # things of which it is known when they were last said
OURS = (
    "molehill", "molehill_server", "molehill_client", "molehill_simulation", "molehill_edge", "molehill_export",
    "molehill_web",
)  # fmt: skip


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``time`` (UTC), ``level``, ``logger``, ``message``, and what `fields` added.

    A record with an exception has ``exception``, the whole traceback as one string.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


class _LineFormatter(logging.Formatter):
    """One line per record; nothing in it that a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name that logging calls
        """Return the record's line, to which a traceback may be added."""
        record.message = harmless(record.message)
        return super().formatMessage(record)


class _Handler(logging.StreamHandler[Any]):
    """Writes to what standard error is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def use_json() -> None:
    """Send all records of this process to standard error as JSON; warnings of Python as well.

    Records of Molehill count from INFO on, those of other libraries from WARNING on.
    """
    handler = _Handler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    os.environ[VARIABLE] = "1"  # for processes that we start


def begin() -> None:
    """Send records to standard error in a process that runs on: as lines, or as JSON when `VARIABLE` asks for it."""
    survive()
    if os.environ.get(VARIABLE, "") not in {"", "0"}:
        use_json()
    if structured():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def structured() -> bool:
    """Whether `use_json` was called."""
    return any(isinstance(handler, _Handler) for handler in logging.getLogger().handlers)


class Seldom:
    """Keeps what happens again and again, say a machine that is refused and tries once a second, out of logs.

    Args:
        every: Seconds after which the same thing is worth another line.
    """

    def __init__(self, every: float = 600.0) -> None:
        self._every = every
        self._seen: dict[object, tuple[float, int]] = {}

    def __call__(self, what: Hashable) -> str | None:
        """What to add to a line about this, to wit how often it was held back; None to hold it back."""
        now = time.monotonic()
        said, held = self._seen.pop(what, (-math.inf, 0))
        if now - said < self._every:
            self._seen[what] = said, held + 1
            return None
        self._seen[what] = now, 0
        if len(self._seen) > _KEPT:
            self._seen.pop(next(iter(self._seen)))
        return f" ({held} times more since it was last said)" if held else ""


def fields(**values: Any) -> dict[str, Any]:
    """What to give as ``extra`` so that a record has further fields; ``time`` and the like cannot be replaced."""
    reserved = {"time", "level", "logger", "message"}
    return {_FIELDS: {key: value for key, value in values.items() if key not in reserved}}
