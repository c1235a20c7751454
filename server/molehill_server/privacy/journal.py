"""A masked sum on disk, from the moment at which clients are asked to unmask it until its round is committed.

A client helps with one sum per round only. So a server that dies in between must ask the same question again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molehill.errors import ResumeError
from molehill.files import write
from molehill.secure.masks import Numbers
from molehill_server.privacy.draw import Round
from molehill_server.privacy.secure import Progress


class Facts(BaseModel):
    """What the round's event will say.

    Attributes:
        selected: Clients that were asked.
        accepted: Those that are in the sum.
        deltas: Digest of every masked vector.
        missing: Clients that did not answer.
        quarantined: Reasons by client.
        unusable: Why the model could not be trained, by client.
        bytes_up: Bytes received.
        bytes_down: Bytes fetched.
        drawn: What the round costs of the privacy budget; see `Ledger`.
    """

    model_config = ConfigDict(extra="forbid")

    selected: list[str]
    accepted: list[str]
    deltas: dict[str, str]
    missing: list[str]
    quarantined: dict[str, str]
    unusable: dict[str, str] = Field(default_factory=dict)
    bytes_up: int
    bytes_down: int
    drawn: Round | None


class Entry(NamedTuple):
    """What the journal holds.

    Attributes:
        progress: How far the attempt got.
        facts: About the round.
        total: The masked sum, ``[n]``.
    """

    progress: Progress
    facts: Facts
    total: Numbers


class Journal:
    """At most one masked sum.

    Args:
        path: The file: a line of JSON for each of progress and facts, a line with the SHA-256 of all the rest, then the
            numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, entry: Entry) -> None:
        """Write the sum, in place of an earlier one."""
        progress, facts = entry.progress.model_dump_json().encode(), entry.facts.model_dump_json().encode()
        numbers = entry.total.astype("<u8", copy=False).tobytes()
        write(self._path, b"\n".join((progress, facts, _digest(progress, facts, numbers), numbers)))

    def load(self, run: str, round_: int) -> Entry | None:
        """The sum of this round, if it was kept.

        Raises:
            ResumeError: The file is damaged.
        """
        try:
            progress, facts, numbers = _whole(self._path.read_bytes())
            entry = Entry(
                Progress.model_validate_json(progress),
                Facts.model_validate_json(facts),
                np.frombuffer(numbers, "<u8").astype(np.uint64),
            )
        except FileNotFoundError:
            return None
        except (ValidationError, ValueError):
            raise ResumeError(
                "the masked sum is damaged",
                where=str(self._path),
                mend="Remove it to try its round again; once clients have helped to unmask it they refuse, and a run "
                "with another name must begin.",
            ) from None
        return entry if (entry.progress.run, entry.progress.round) == (run, round_) else None

    def drop(self) -> None:
        """Forget the sum: its round is committed."""
        self._path.unlink(missing_ok=True)


def _whole(data: bytes) -> tuple[bytes, bytes, bytes]:
    progress, facts, known, numbers = data.split(b"\n", 3)
    if known != _digest(progress, facts, numbers):
        raise ValueError("it does not fit its digest")
    return progress, facts, numbers


def _digest(*parts: bytes) -> bytes:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest().encode()
