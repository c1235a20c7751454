"""What a client keeps for itself, on its own disk.

One folder per client. Every round writes new files and keeps a few old ones, so that a round that has to be repeated
after a crash starts from what the client had before it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from molehill.errors import ResumeError
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Layout, Tree

_KEEP = 3  # rounds


@dataclass
class PersonalState:
    """A client's own state after a round.

    Attributes:
        tree: Personal tensors.
        memory: Error feedback of the codec, by wire key; empty for codecs without.
        held: Digests of the blobs this client has, by group.
    """

    tree: Tree
    memory: Tree
    held: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> PersonalState:
        """The state of a client that never trained."""
        return cls(Tree(Layout({})), Tree(Layout({})))


class StateStore:
    """Reads and writes the personal state of one client in one run.

    Args:
        folder: The client's folder.
        run: Name of the run.
        base: Digest of the base weights.
    """

    def __init__(self, folder: Path, run: str, base: str) -> None:
        self.folder = folder
        self._meta = {"run": run, "base": base}

    def before(self, round_: int) -> PersonalState:
        """The newest state from a round earlier than ``round_``; empty when there is none.

        Raises:
            ResumeError: The state belongs to another run or base model.
        """
        rounds = [number for number in self._rounds() if number < round_]
        if not rounds:
            return PersonalState.empty()
        folder = self.folder / f"round-{max(rounds):06d}"
        tree, meta = load_tree(folder / "personal.safetensors")
        for key, wanted in self._meta.items():
            if meta.get(key) != wanted:
                raise ResumeError(
                    f"personal state belongs to another {key} ({meta.get(key)!r}, not {wanted!r})",
                    where=str(folder),
                    mend="Use a new run folder, or remove this client's folder to start its personal state anew.",
                )
        memory, _ = load_tree(folder / "memory.safetensors")
        return PersonalState(tree, memory, json.loads(meta["held"]))

    def save(self, round_: int, state: PersonalState) -> None:
        """Write the state after ``round_``, all files at once, and drop old rounds."""
        final = self.folder / f"round-{round_:06d}"
        draft = self.folder / f".round-{round_:06d}.{os.getpid()}"
        _remove(draft)
        draft.mkdir(parents=True)
        save_tree(draft / "personal.safetensors", state.tree, {**self._meta, "held": json.dumps(state.held)})
        save_tree(draft / "memory.safetensors", state.memory, self._meta)
        _remove(final)
        draft.rename(final)
        for number in sorted(self._rounds())[:-_KEEP]:
            _remove(self.folder / f"round-{number:06d}")

    def _rounds(self) -> list[int]:
        return [int(path.name.removeprefix("round-")) for path in self.folder.glob("round-*")]


def _remove(folder: Path) -> None:
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
