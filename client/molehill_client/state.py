"""What a client keeps for itself, encrypted on its own disk.

One file after every round, replaced at once, and a few old ones, so that a round that has to be repeated after a crash
starts from what the client had before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from molehill import config, files
from molehill.errors import AdapterError, ResumeError
from molehill.tasks.outcomes import Outcomes
from molehill.wire.store import load_tree, pack_tree, unpack_tree
from molehill.wire.tree import Layout, Tree
from molehill_client.secret import KeyFile, KeySource, damaged, seal, unseal

_KEEP = 3  # rounds
_STATE, _MASKING, _FINDINGS, _INSTANCE = "state", "masking.sealed", "evaluation.sealed", "instance"
_OUTCOMES = "outcomes.sealed"
_PLAIN = re.compile(rb"[0-9a-f]{16}")
_LENGTH = struct.Struct("<Q")


@dataclass
class PersonalState:
    """A client's own state after a round.

    Attributes:
        tree: Personal tensors.
        memory: Error feedback of the codec, by wire key; empty for codecs without.
        held: Digests of the blobs this client has, by group.
        owed: What the error feedback would be had nothing of the round's delta arrived; empty for codecs without.
        round: The round after which it is; 0 for a client that never trained.
        own: What takes the place of tensors of the shared model, where the owner chose a model that replaces them; no
            round goes on from it.
        chosen: Name of the candidate that the owner chose; empty where there was no choice.
        k: Experts per token of the owner; None leaves it to the selector.
    """

    tree: Tree
    memory: Tree
    held: dict[str, str] = field(default_factory=dict)
    owed: Tree = field(default_factory=lambda: Tree(Layout({})))
    round: int = 0
    own: Tree = field(default_factory=lambda: Tree(Layout({})))
    chosen: str = ""
    k: int | None = None

    @property
    def personal(self) -> Tree:
        """What to load over the shared model to have the owner's."""
        return Tree.of({**self.tree, **self.own})

    def settle(self, accepted: int) -> None:
        """Add back what the server could not use of the last delta.

        Args:
            accepted: The last round in which it used one of this client.
        """
        if self.round > accepted:
            self.memory = Tree.of({**self.memory, **self.owed})
        self.owed = Tree(Layout({}))

    @classmethod
    def empty(cls) -> PersonalState:
        """The state of a client that never trained."""
        return cls(Tree(Layout({})), Tree(Layout({})))


@dataclass(frozen=True)
class Sample:
    """What the final model answered to a held-out row; it never leaves the client.

    Attributes:
        question: What was asked.
        reference: The right answer.
        answer: What the model wrote.
    """

    question: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Findings:
    """What an evaluation found that never leaves the client.

    Attributes:
        samples: What the personalised model answered.
        confusion: By stage, how many held-out rows of each class (row) were taken for each (column).
        found: By stage and type, how many entities of the held-out rows are right, were found and are there.
    """

    samples: Sequence[Sample] = ()
    confusion: Mapping[str, list[list[int]]] = field(default_factory=dict)
    found: Mapping[str, Mapping[str, tuple[int, int, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowScores:
    """What each held-out row, or piece of one, was scored; it never leaves the client.

    Attributes:
        units: Of every row the number of the unit it is of: only units are independent of each other.
        stages: By stage what its model scored, row by row in the same order.
    """

    units: Sequence[int] = ()
    stages: Mapping[str, Outcomes] = field(default_factory=dict)


class StateStore:
    """Reads and writes the personal state of one client in one run.

    Every file is bound to run, base, client and round: none can be read anywhere else, nor in another's place.

    Args:
        folder: The client's folder; its name is the client's.
        run: Name of the run.
        base: Digest of the base weights.
        key: Where the key is; ``state.key`` beside the folder when omitted, one for all clients there.
        instance: Tells the run from others of its name, whose states are not read, and gone with the first that is
            written; empty takes whatever is there.
    """

    def __init__(self, folder: Path, run: str, base: str, key: KeySource | None = None, instance: str = "") -> None:
        self.folder = folder
        self._key = key or KeyFile(folder.parent / "state.key")
        self._label = {"run": run, "base": base, "client": folder.name}
        self._instance = instance

    def before(self, round_: int) -> PersonalState:
        """The newest state from a round earlier than ``round_``; empty when there is none.

        Raises:
            ResumeError: The state belongs to another run, base model or client, is damaged, or its key is not here.
        """
        rounds = [number for number in self.rounds() if number < round_]
        if not rounds or self._foreign():
            return PersonalState.empty()
        key = self._key.load()
        if key is None:
            raise _no_key(self._key, self.folder)
        path = self._at(max(rounds))
        try:
            sealed = path.read_bytes()
        except OSError as error:
            what = f"cannot read the personal state: {error.strerror}"
            raise ResumeError(what, where=str(path), mend="Check its permissions, and the disk.") from None
        data = unseal(sealed, self._label_of(max(rounds)), key, str(path))
        try:
            *trees, told = _parts(data, 5)
            tree, memory, owed, own = (unpack_tree(part, str(path)) for part in trees)
            found = files.parse_json(told)
            held, chosen = found["held"], str(found["chosen"])
            k = None if found.get("k") is None else int(found["k"])  # older versions did not tell
            return PersonalState(tree, memory, held, owed, max(rounds), own, chosen, k)
        except (AdapterError, LookupError, TypeError, ValueError, struct.error):  # whole, but of another form
            raise damaged(str(path)) from None

    def save(self, round_: int, state: PersonalState) -> None:
        """Write the state after ``round_``, all at once, and drop old rounds.

        Raises:
            ResumeError: There are older states, and their key is not here; or it cannot be used.
        """
        key = self._key_to_write()
        files.make_folder(self.folder)
        if self._foreign():
            (self.folder / _OUTCOMES).unlink(missing_ok=True)
            for number in self.rounds():
                self._at(number).unlink(missing_ok=True)
        if self._instance:
            note = f"{self._instance} {_checked(self._instance.encode())}"
            files.write(self.folder / _INSTANCE, note.encode(), mode=files.PRIVATE)
        told = json.dumps({"held": state.held, "chosen": state.chosen, "k": state.k}).encode()
        parts = [*map(pack_tree, (state.tree, state.memory, state.owed, state.own)), told]
        data = b"".join(_LENGTH.pack(len(part)) + part for part in parts)
        files.write(self._at(round_), seal(data, self._label_of(round_), key), mode=files.PRIVATE)
        rounds = [number for number in self.rounds() if number <= round_]
        later = [number for number in self.rounds() if number > round_]  # of an older run of this name
        for number in [*rounds[:-_KEEP], *later]:
            self._at(number).unlink(missing_ok=True)

    def load_secret(self) -> bytes | None:
        """The secrets of secure aggregation that were kept last, of whatever round.

        Raises:
            ResumeError: They belong to another run, base model or client, are damaged, or their key is not here.
        """
        return self._load(_MASKING)

    def save_secret(self, data: bytes) -> None:
        """Keep the secrets of secure aggregation in place of the last ones.

        Raises:
            ResumeError: As of `save`.
        """
        self._save(_MASKING, data)

    def load_findings(self) -> Findings:
        """What the last evaluation found; empty where nothing was kept.

        Raises:
            ResumeError: They belong to another run, base model or client, are damaged, or their key is not here.
        """
        data = self._load(_FINDINGS)
        if data is None:
            return Findings()
        try:
            found = files.parse_json(data)
            samples = [Sample(*map(str, parts)) for parts in found["samples"]]
            return Findings(samples, found["confusion"], found.get("found", {}))
        except (LookupError, ValueError, TypeError):  # whole, but of another form than is written today
            raise damaged(str(self.folder / _FINDINGS)) from None

    def save_findings(self, findings: Findings) -> None:
        """Keep what an evaluation found in place of the last.

        Raises:
            ResumeError: As of `save`.
        """
        samples = [astuple(sample) for sample in findings.samples]
        kept = {"samples": samples, "confusion": findings.confusion, "found": findings.found}
        self._save(_FINDINGS, json.dumps(kept).encode())

    def load_row_scores(self) -> RowScores:
        """What the run's evaluations scored row by row; empty where nothing was kept, or an older run of its name did.

        Raises:
            ResumeError: They belong to another run, base model or client, are damaged, or their key is not here.
        """
        data = self._load(_OUTCOMES)
        if data is None:
            return RowScores()
        try:
            found = files.parse_json(data)
            if found["instance"] != self._instance:
                return RowScores()
            stages = {str(name): Outcomes.of_json(each) for name, each in found["stages"].items()}
            return RowScores([int(unit) for unit in found["units"]], stages)
        except (LookupError, ValueError, TypeError, AttributeError):  # whole, but of another form than is written today
            raise damaged(str(self.folder / _OUTCOMES)) from None

    def save_row_scores(self, found: RowScores) -> None:
        """Keep what was scored row by row in place of the last.

        Raises:
            ResumeError: As of `save`.
        """
        stages = {name: each.as_json() for name, each in found.stages.items()}
        kept = {"instance": self._instance, "units": [*map(int, found.units)], "stages": stages}
        self._save(_OUTCOMES, json.dumps(kept).encode())

    def _load(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.exists():
            return None
        key = self._key.load()
        if key is None:
            raise _no_key(self._key, self.folder)
        return unseal(path.read_bytes(), {**self._label, "file": name}, key, str(path))

    def _save(self, name: str, data: bytes) -> None:
        key = self._key_to_write()
        files.make_folder(self.folder)
        files.write(self.folder / name, seal(data, {**self._label, "file": name}, key), mode=files.PRIVATE)

    def _key_to_write(self) -> bytes:
        """The key; made where nothing needs an older one."""
        key = self._key.load()
        if key is None and self.rounds():
            raise _no_key(self._key, self.folder)
        return key or self._key.create()

    def rounds(self) -> list[int]:
        """Rounds after which a state was kept, in their order."""
        names = (path.name for path in self.folder.glob("round-*.sealed"))
        numbers = (name.removeprefix("round-").removesuffix(".sealed") for name in names)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _foreign(self) -> bool:
        """Whether the states that are there are of another run of this name, as their note says.

        Raises:
            ResumeError: The note is damaged.
        """
        note = self.folder / _INSTANCE
        if not self._instance or not note.exists():
            return False
        known, _, check = note.read_bytes().partition(b" ")
        older = not check and _PLAIN.fullmatch(known)  # versions that wrote no check
        if not older and check.decode(errors="replace") != _checked(known):
            mend = "Restore it, or remove it if the states beside it are of the run that goes on."
            raise ResumeError("the note that says of which run the states are is damaged", where=str(note), mend=mend)
        return known != self._instance.encode()

    def _at(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.sealed"

    def _label_of(self, number: int) -> dict[str, str]:
        return {**self._label, "round": str(number), "file": _STATE}


def store_in(out: Path, client: str) -> StateStore:
    """What a client of a simulation keeps.

    Args:
        out: Run folder.
        client: The client's id.

    Raises:
        ConfigError: The folder's configuration cannot be read.
        AdapterError: What everybody started from cannot be read there.
    """
    _, start = load_tree(out / "initial.safetensors")
    return StateStore(out / "clients" / client, config.load(out / "config.toml").run.name, start["base"])


def _checked(instance: bytes) -> str:
    return hashlib.sha256(instance).hexdigest()[:16]


def _parts(data: bytes, count: int) -> list[bytes]:
    """Undo writing parts one after another, each with its length before it.

    Raises:
        ValueError: There are more or fewer.
        struct.error: The data end too early.
    """
    parts, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        parts.append(data[at - length : at])
    if len(parts) != count or at != len(data):
        raise ValueError(f"{len(parts)} parts")
    return parts


def _no_key(key: KeySource, folder: Path) -> ResumeError:
    return ResumeError(
        f"the key of the personal state is not there ({key})",
        where=str(folder),
        mend="Bring it back, or remove this folder to start the personal state anew.",
    )
