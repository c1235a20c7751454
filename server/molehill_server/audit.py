"""The audit log of a run: who took part, what was accepted or refused and why, and every version committed.

``audit.jsonl`` holds one entry a line: ``sequence`` (from 1), ``time`` (UTC), ``event``, ``fields``, ``previous`` (hash
of the entry before) and ``hash`` (SHA-256 over the canonical JSON of all the others). So nobody changes, removes or
reorders a line unnoticed. Who can write the file can still cut off its end or write it all anew: against that, note
the last hash somewhere else now and then, and have `verify` look for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from molehill import logs
from molehill.errors import DataError, ResumeError
from molehill.files import parse_json, sync

START = "0" * 64  # what the first entry follows

_log = logging.getLogger(__name__)

# What of a run's events is kept: by event, its fields. What clients measured is not.
_KEPT = {
    "start": ("run", "rounds", "clients", "config_digest"),
    "resume": ("run", "round", "clients", "config_digest"),
    "joined": ("client",),
    "anew": ("client", "round", "kept", "accepted"),
    "refused": ("client", "reason"),
    "round": ("round", "selected", "accepted", "deltas", "missing", "quarantined", "unusable"),
    "retry": ("round", "attempt", "missing", "quarantined", "unusable"),
    "capped": ("client", "rows", "counts", "reason"),
    "failed": ("stage", "client", "reason"),
    "end": ("bytes_up", "bytes_down"),
}


@dataclass(frozen=True)
class Verdict:
    """What a log comes to.

    Attributes:
        entries: Number of whole entries.
        head: Hash of the last one.
        round: The last that was committed; 0 when none was.
    """

    entries: int
    head: str
    round: int = 0


class AuditLog:
    """Appends to an audit log; every entry is on the disk before `append` returns.

    A last line that a crash cut off is removed, and an entry ``recovered`` says so.

    Args:
        path: The file; made with the first entry.
        head: Hash of an entry that it must have; empty for none. When the whole file is gone, the new one begins with
            an entry ``lost`` that says so.

    Raises:
        ResumeError: The file was changed, so nothing is appended to it.
    """

    def __init__(self, path: Path, head: str = "") -> None:
        self._path = path
        self._lock = threading.Lock()
        self._last = Verdict(0, START)
        self._torn: int | None = None  # bytes of the file that are good, when a failure left more there
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if head:
                self.append("lost", head=head)
            return
        try:
            self._last, torn = _check(path, head if head and not _says_lost(path, head) else None)
        except DataError as error:
            raise ResumeError(
                f"the audit log was changed: {error.what}",
                where=error.where,
                mend="Keep the file, find out who did, and move it away to go on with a new one.",
            ) from None
        if torn:
            os.truncate(path, path.stat().st_size - torn)
            self.append("recovered", bytes_cut=torn)

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self._last.head

    @property
    def round(self) -> int:
        """The last round of which it says that it was committed; 0 for none."""
        return self._last.round

    def append(self, event: str, **fields: Any) -> None:
        """Write one entry, and the same to the log of this process.

        Args:
            event: What happened.
            fields: Facts about it, as JSON knows them.

        Raises:
            OSError: The disk is full or fails. Nothing of the entry stays in the file, and the log can go on.
        """
        with self._lock:
            last = self._last
            entry = {
                "sequence": last.entries + 1,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                "fields": fields,
                "previous": last.head,
            }
            line, head = _line(entry)
            self._write(line, new=not last.entries)
            self._last = Verdict(last.entries + 1, head, _committed(entry, last))
        facts = "".join(f", {key} {value}" for key, value in fields.items() if isinstance(value, str | int | float))
        _log.info("%s%s", event, facts, extra=logs.fields(event=event, **fields))

    def _write(self, line: bytes, *, new: bool) -> None:
        """Bring a line to the disk, or leave the file as it was: the next entry must not begin in a half one."""
        self._mend()
        with self._path.open("ab", buffering=0) as file:  # a buffer would try once more when it is closed
            good = file.tell()
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                if new:
                    sync(self._path.parent)
            except OSError:
                self._torn = good
                with contextlib.suppress(OSError):  # then before the next entry
                    self._mend()
                raise

    def _mend(self) -> None:
        if self._torn is not None:
            os.truncate(self._path, self._torn)
            self._torn = None

    def record(self, event: dict[str, Any]) -> None:
        """Append what of a run's event belongs into the log, if anything (`molehill_server.events.Listener`)."""
        kept = _KEPT.get(event["event"])
        if kept is not None:
            self.append(event["event"], **{key: event[key] for key in kept if key in event})


def verify(path: Path, head: str | None = None) -> Verdict:
    """Check a log from its first line to its last.

    Args:
        path: The file.
        head: A hash noted earlier, which some entry must have.

    Raises:
        DataError: The file cannot be read, or names the first line that is not what was written; or no entry has the
            hash, so the end was cut off or the log written anew.
    """
    verdict, torn = _check(path, head)
    if torn:
        raise DataError(
            "the line is cut off",
            where=f"{path}:{verdict.entries + 1}",
            mend="If a crash did it, the run that goes on removes it and says so.",
        )
    return verdict


def _check(path: Path, head: str | None = None) -> tuple[Verdict, int]:
    """Check all whole lines; also the number of bytes after them."""
    last, torn, seen = Verdict(0, START), 0, head in (None, START)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    torn = len(line)
                    break
                last = _after(last, line, f"{path}:{number}")
                seen = seen or last.head == head
    except OSError as error:
        raise DataError(f"cannot read the audit log: {error.strerror}", where=str(path)) from None
    if not seen:
        raise DataError(
            f"no entry has the hash {head}", where=str(path), mend="The end was cut off, or the log written anew."
        )
    return last, torn


def _says_lost(path: Path, head: str) -> bool:
    """Whether a log begins with the words that the one with this entry is gone."""
    with path.open("rb") as file:
        try:
            first = parse_json(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and first.get("event") == "lost" and first.get("fields") == {"head": head}


def _after(last: Verdict, line: bytes, where: str) -> Verdict:
    """What a log comes to with a line that is, to the byte, an entry that follows the last one."""
    try:
        entry = parse_json(line)
        found = entry.pop("hash")
        again, digest = _line(entry)
        committed = _committed(entry, last)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError("not an entry of an audit log", where=where) from None
    if digest != found or again != line:
        raise DataError("the entry was changed: it does not fit its hash", where=where)
    if entry.get("previous") != last.head or entry.get("sequence") != last.entries + 1:
        raise DataError("the entry does not follow the one before: lines were removed or reordered", where=where)
    return Verdict(last.entries + 1, digest, committed)


def _committed(entry: dict[str, Any], last: Verdict) -> int:
    """The last round that was committed, with this entry."""
    number = entry["fields"].get("round") if entry["event"] == "version" else None
    return number if isinstance(number, int) else last.round


def _line(entry: dict[str, Any]) -> tuple[bytes, str]:
    """An entry as its line, and its hash."""
    digest = hashlib.sha256(_canonical(entry)).hexdigest()
    return _canonical({**entry, "hash": digest}) + b"\n", digest


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
