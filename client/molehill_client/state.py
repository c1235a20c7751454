"""What a client keeps for itself, encrypted on its own disk.

One folder per client. Every round writes new files and keeps a few old ones, so that a round that has to be repeated
after a crash starts from what the client had before it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from molehill import files
from molehill.errors import ResumeError
from molehill.wire.store import pack_tree, unpack_tree
from molehill.wire.tree import Layout, Tree
from molehill_client.secret import KeyFile, KeySource, seal, unseal

_KEEP = 3  # rounds
_TREE, _MEMORY, _HELD = "personal.sealed", "memory.sealed", "held.sealed"
_MASKING = "masking.sealed"


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

    Every file is bound to run, base, client and round: none can be read anywhere else, nor in another's place.

    Args:
        folder: The client's folder; its name is the client's.
        run: Name of the run.
        base: Digest of the base weights.
        key: Where the key is; ``state.key`` beside the folder when omitted, one for all clients there.
    """

    def __init__(self, folder: Path, run: str, base: str, key: KeySource | None = None) -> None:
        self.folder = folder
        self._key = key or KeyFile(folder.parent / "state.key")
        self._label = {"run": run, "base": base, "client": folder.name}

    def before(self, round_: int) -> PersonalState:
        """The newest state from a round earlier than ``round_``; empty when there is none.

        Raises:
            ResumeError: The state belongs to another run, base model or client, is damaged, or its key is not here.
        """
        rounds = [number for number in self.rounds() if number < round_]
        if not rounds:
            return PersonalState.empty()
        key = self._key.load()
        if key is None:
            raise _no_key(self._key, self.folder)
        number = max(rounds)
        tree, memory, held = (self._open(number, name, key) for name in (_TREE, _MEMORY, _HELD))
        where = str(self._at(number))
        return PersonalState(unpack_tree(tree, where), unpack_tree(memory, where), json.loads(held))

    def save(self, round_: int, state: PersonalState) -> None:
        """Write the state after ``round_``, all files at once, and drop old rounds.

        Raises:
            ResumeError: There are older states, and their key is not here; or it cannot be used.
        """
        key = self._key.load()
        if key is None:
            if self.rounds():
                raise _no_key(self._key, self.folder)
            key = self._key.create()
        final = self._at(round_)
        draft = self.folder / f".{final.name}.{os.getpid()}"
        _remove(draft)
        draft.mkdir(parents=True)
        parts = {
            _TREE: pack_tree(state.tree),
            _MEMORY: pack_tree(state.memory),
            _HELD: json.dumps(state.held).encode(),
        }
        for name, data in parts.items():
            files.write(draft / name, seal(data, self._label_of(round_, name), key), mode=files.PRIVATE)
        _remove(final)
        draft.rename(final)
        files.sync(self.folder)
        rounds = [number for number in self.rounds() if number <= round_]
        later = [number for number in self.rounds() if number > round_]  # of an older run of this name
        for number in [*rounds[:-_KEEP], *later]:
            _remove(self._at(number))

    def load_secret(self) -> bytes | None:
        """The secrets of secure aggregation that were kept last, of whatever round.

        Raises:
            ResumeError: They belong to another run, base model or client, are damaged, or their key is not here.
        """
        path = self.folder / _MASKING
        if not path.exists():
            return None
        key = self._key.load()
        if key is None:
            raise _no_key(self._key, self.folder)
        return unseal(path.read_bytes(), {**self._label, "file": _MASKING}, key, str(path))

    def save_secret(self, data: bytes) -> None:
        """Keep the secrets of secure aggregation in place of the last ones."""
        key = self._key.load() or self._key.create()
        self.folder.mkdir(parents=True, exist_ok=True)
        sealed = seal(data, {**self._label, "file": _MASKING}, key)
        files.write(self.folder / _MASKING, sealed, mode=files.PRIVATE)

    def rounds(self) -> list[int]:
        """Rounds after which a state was kept, in their order."""
        return sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("round-*"))

    def _open(self, number: int, name: str, key: bytes) -> bytes:
        path = self._at(number) / name
        try:
            sealed = path.read_bytes()
        except OSError as error:
            raise ResumeError(
                f"cannot read the personal state: {error.strerror}",
                where=str(path),
                mend="Remove this round's folder to go on from the one before.",
            ) from None
        return unseal(sealed, self._label_of(number, name), key, str(path))

    def _at(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}"

    def _label_of(self, number: int, name: str) -> dict[str, str]:
        return {**self._label, "round": str(number), "file": name}


def _no_key(key: KeySource, folder: Path) -> ResumeError:
    return ResumeError(
        f"the key of the personal state is not there ({key})",
        where=str(folder),
        mend="Bring it back, or remove this folder to start the personal state anew.",
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
