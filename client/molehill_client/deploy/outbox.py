"""The last delta and reply of a node, kept until the next: a plan that comes twice is answered without training twice.

That happens when the coordinator was killed before it committed the round, or when this machine's node was: the
coordinator sends the same plan again, and the delta is uploaded already or is uploaded now.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from molehill import files
from molehill.errors import MessageError
from molehill.wire.exchange import Exchange, Place
from molehill.wire.local import FolderExchange
from molehill.wire.message import digest


class Outbox:
    """An exchange that keeps a copy of what was put last.

    Args:
        exchange: The coordinator's.
        folder: For the copy and the reply; made when missing.
    """

    def __init__(self, exchange: Exchange, folder: Path) -> None:
        self._exchange = exchange
        self._blobs = FolderExchange(folder)
        self._note = folder / "reply.json"

    def put(self, blob: bytes, at: Place | None = None) -> str:
        """See `Exchange.put`."""
        held = self._read().get("delta")
        if held is not None and held != digest(blob):
            self._note.unlink(missing_ok=True)
            self._blobs.drop(held)
        self._blobs.put(blob)
        return self._exchange.put(blob, at)

    def get(self, name: str, max_bytes: int | None = None) -> bytes:
        """See `Exchange.get`."""
        return self._exchange.get(name, max_bytes)

    def has(self, name: str) -> bool:
        """See `Exchange.has`."""
        return self._exchange.has(name)

    def drop(self, name: str) -> None:
        """See `Exchange.drop`."""
        self._exchange.drop(name)

    def remember(self, question: str, at: Place, delta: str, reply: str) -> None:
        """Note down the reply to a question.

        Args:
            question: All that the reply depends on.
            at: The round.
            delta: Digest of what was put for it.
            reply: The reply.
        """
        note = {"question": _hash(question), "run": at.run, "round": at.round, "delta": delta, "reply": reply}
        files.write(self._note, json.dumps(note).encode(), mode=files.PRIVATE)

    def recall(self, question: str) -> str | None:
        """The reply to a question that was answered last, its delta uploaded again; None when it was another one."""
        note = self._read()
        if note.get("question") != _hash(question):
            return None
        try:
            blob = self._blobs.get(note["delta"])
        except MessageError:
            return None
        self._exchange.put(blob, Place(note["run"], int(note["round"])))
        return str(note["reply"])

    def _read(self) -> dict[str, str]:
        try:
            note = files.parse_json(self._note.read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
