"""What a run has come to, in memory and on disk: its checkpoint, its events and its audit log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molehill.config import Config
from molehill.errors import ResumeError
from molehill.wire.store import load_tree
from molehill_server import checkpoint, events
from molehill_server.audit import AuditLog
from molehill_server.privacy.accountant import Ledger
from molehill_server.records import Global


class Record:
    """The record of one run, new or as its last checkpoint left it.

    Args:
        config: The run's configuration.
        out: Run folder.
        ledger: What is spent of the privacy budget before the first round; None without one.

    Raises:
        ResumeError: The folder holds a run with another configuration or base model, its logs were changed, or its
            checkpoints are gone, or the last one under privacy.
    """

    def __init__(self, config: Config, out: Path, ledger: Ledger | None) -> None:
        self._folder = out / "checkpoints"
        initial, meta = load_tree(out / "initial.safetensors")
        if "base" not in meta:
            raise ResumeError("it does not say which base model it is for", where=str(out / "initial.safetensors"))
        self.layout = initial.layout
        identity = checkpoint.Identity(config.digest, meta["base"])
        loaded = checkpoint.load(self._folder, identity, config.wire.max_bytes)
        self.fresh = loaded is None
        self.saved = loaded or checkpoint.Checkpoint(identity, Global(initial), {}, (), privacy=ledger)
        self.audit = AuditLog(out / "audit.jsonl", self.saved.audit)
        self._require_newest()
        log = out / "metrics.jsonl"
        if loaded is None:
            log.unlink(missing_ok=True)
        else:
            events.rewind(log, loaded.log)
        self.log = events.EventLog(log, self.audit.record)

    @property
    def base(self) -> str:
        """Digest of the base weights."""
        return self.saved.identity.base

    def _require_newest(self) -> None:
        """Refuse to begin anew, or to forget what was spent, where the audit log knows of a later round."""
        last, mend = self.audit.round, "Bring it back, or start a new run in another folder."
        if self.fresh and last:
            what = f"there is no checkpoint any more, and round {last} was committed by the audit log"
            raise ResumeError(what, where=str(self._folder), mend=mend)
        if not self.fresh and self.saved.privacy is not None and last > self.saved.glob.round:
            what = f"the checkpoint of round {last} is gone, and with it what that round spent of the privacy budget"
            raise ResumeError(what, where=str(self._folder), mend=mend)

    def begin(self, rows: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Note that the run begins, or goes on.

        Args:
            rows: Training rows of every client that is there.
            facts: About the run, for the event.
        """
        if self.fresh:
            self.log.emit("start", **facts)
            self.commit(replace(self.saved, clients=tuple(rows), rows=rows))
        else:
            self.log.emit("resume", round=self.saved.glob.round, **facts)
            self._note_version()  # again: a kill may have come between the commit and its note

    def join(self, rows: Mapping[str, int]) -> None:
        """Take in clients that are new to the run, with the training rows they name."""
        if rows:
            saved = self.saved
            self.saved = replace(saved, clients=(*saved.clients, *rows), rows={**saved.rows, **rows})
        for client in rows:
            self.log.emit("joined", client=client)

    def commit(self, state: checkpoint.Checkpoint) -> None:
        """Make this the state to go on from, also after a kill."""
        self.saved = replace(state, log=self.log.commit(), audit=self.audit.head)
        checkpoint.save(self._folder, self.saved)
        self._note_version()

    def _note_version(self) -> None:
        glob = self.saved.glob
        self.audit.append("version", round=glob.round, digest=glob.tree.digest)
