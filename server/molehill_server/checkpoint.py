"""Atomic checkpoints: after every round, everything that is needed to go on as if nothing had happened.

``checkpoints/round-00003/`` holds ``tree.safetensors``, ``patches.safetensors``, ``state.<name>.safetensors`` per
tree of the server optimiser, ``seen.safetensors`` where an assignment looks at changes, ``blobs/<digest>`` (what
clients hold, byte for byte) and ``meta.json``, with the digests of all files, itself included. A folder is written
under another name, synced and renamed, so a folder named ``round-*`` is whole when it is made; what became of it since
is found when it is read. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from molehill.errors import AdapterError, MessageError, ResumeError
from molehill.files import digest_of, make_folder, parse_json, sync, write
from molehill.wire.message import decode_tree, digest
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Tree
from molehill_server.broadcast import Blob, patch_tree, tree_patches
from molehill_server.events import EMPTY, Mark
from molehill_server.norms import Medians
from molehill_server.planning.assigning import Leaning
from molehill_server.privacy.accountant import Ledger
from molehill_server.privacy.draw import Round
from molehill_server.records import Global

_FORMAT = 2
_KEEP = 2
_META = "meta.json"
_SEEN = "seen.safetensors"


@dataclass(frozen=True)
class Identity:
    """What must not change between a run and its continuation.

    Attributes:
        config: Digest of the resolved configuration.
        base: Digest of the base weights.
    """

    config: str
    base: str


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes:
        identity: Of the run.
        glob: The model.
        blobs: What was last sent, by group.
        clients: Ids of all clients seen so far.
        bytes_up: Bytes received in all rounds.
        bytes_down: Bytes that clients fetched in all rounds.
        privacy: What was spent; None without privacy.
        rows: Training rows that every client named when it first joined.
        norms: Medians of the norms of accepted deltas; see `molehill_server.norms`.
        accepted: The last round in which a delta of a client was used, by client.
        seen: Sums of changes that an assignment looks at, by client.
        leanings: What of the experts is whose, by client, where something was decided.
        log: How far the run's events were written.
        audit: Hash of the last entry of the audit log; empty when there is none.
    """

    identity: Identity
    glob: Global
    blobs: Mapping[str, Blob]
    clients: tuple[str, ...]
    bytes_up: int = 0
    bytes_down: int = 0
    privacy: Ledger | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    norms: Medians = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)
    log: Mark = EMPTY
    audit: str = ""
    seen: Mapping[str, Tree] = field(default_factory=dict)
    leanings: Mapping[str, Leaning] = field(default_factory=dict)


class _Leaning(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bias: dict[str, float]
    trains: tuple[str, ...] | None
    apart: bool = False


class _Privacy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    secret: int
    rounds: tuple[Round, ...]


class _Meta(BaseModel):
    """Contents of ``meta.json``."""

    model_config = ConfigDict(extra="forbid")

    format: int
    round: int
    config: str
    base: str
    state: dict[str, float]
    trees: tuple[str, ...]
    blobs: dict[str, str]
    clients: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    rows: dict[str, int]
    norms: dict[str, tuple[float, ...]]
    privacy: _Privacy | None
    accepted: dict[str, int]
    log: Mark
    audit: str
    files: dict[str, str]
    seen: tuple[str, ...] = ()  # before 0.9 there were none
    leanings: dict[str, _Leaning] = {}


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Commit a checkpoint and remove old ones.

    Args:
        folder: The run's ``checkpoints`` folder.
        checkpoint: What to save.

    Returns:
        The folder of this checkpoint.
    """
    glob = checkpoint.glob
    final = folder / f"round-{glob.round:05d}"
    scratch = folder / f".{final.name}"
    for old in folder.glob(".round-*"):  # of a run that was killed here
        shutil.rmtree(old)
    make_folder(scratch / "blobs")
    save_tree(scratch / "tree.safetensors", glob.tree, {})
    save_tree(scratch / "patches.safetensors", patch_tree(glob.patches), {})
    if checkpoint.seen:
        save_tree(scratch / _SEEN, _stacked(list(checkpoint.seen.values())), {})
    numbers = {}
    for name, value in glob.state.items():
        if isinstance(value, Tree):
            save_tree(scratch / f"state.{name}.safetensors", value, {})
        else:
            numbers[name] = float(value)
    for blob in checkpoint.blobs.values():
        write(scratch / "blobs" / blob.digest, blob.data)
    meta = {
        "format": _FORMAT,
        "round": glob.round,
        "config": checkpoint.identity.config,
        "base": checkpoint.identity.base,
        "state": numbers,
        "trees": [name for name, value in glob.state.items() if isinstance(value, Tree)],
        "blobs": {name: blob.digest for name, blob in checkpoint.blobs.items()},
        "clients": list(checkpoint.clients),
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "rows": dict(checkpoint.rows),
        "norms": {kind: list(medians) for kind, medians in checkpoint.norms.items()},
        "privacy": checkpoint.privacy and {"secret": checkpoint.privacy.secret, "rounds": checkpoint.privacy.rounds},
        "accepted": dict(checkpoint.accepted),
        "log": checkpoint.log._asdict(),
        "audit": checkpoint.audit,
        "seen": list(checkpoint.seen),
        "leanings": {
            client: {
                "bias": dict(each.bias),
                "trains": None if each.trains is None else sorted(each.trains),
                "apart": each.apart,
            }
            for client, each in checkpoint.leanings.items()
        },
        "files": {path.name: digest_of(path) for path in scratch.glob("*.safetensors")},
    }
    write(scratch / _META, json.dumps({**meta, "sha256": _meta_digest(meta)}, indent=1).encode())
    scratch.rename(final)
    sync(folder)
    for old in _committed(folder)[:-_KEEP]:
        shutil.rmtree(old.rename(folder / f".{old.name}"))  # never a part of one under its own name
    return final


def load(folder: Path, identity: Identity, max_bytes: int) -> Checkpoint | None:
    """Read the last committed checkpoint.

    Args:
        folder: The run's ``checkpoints`` folder.
        identity: Of the run that wants to go on.
        max_bytes: Largest blob.

    Returns:
        The checkpoint; None when none was committed.

    Raises:
        ResumeError: It belongs to another configuration or base model, or is damaged.
    """
    found = _committed(folder)
    if not found:
        return None
    path = found[-1]
    try:
        meta = _read_meta(path / _META)
        _refuse_other(path, Identity(meta.config, meta.base), identity)
        for name, known in meta.files.items():
            _require_digest(path / name, known)
        state: dict[str, Tree | float] = dict(meta.state)
        for name in meta.trees:
            state[name], _ = load_tree(path / f"state.{name}.safetensors")
        tree, _ = load_tree(path / "tree.safetensors")
        patches, _ = load_tree(path / "patches.safetensors")
        seen = _unstacked(load_tree(path / _SEEN)[0], len(meta.seen)) if meta.seen else []
        return Checkpoint(
            identity,
            Global(tree, tree_patches(patches), state, meta.round),
            {name: _blob(path / "blobs" / sha, max_bytes) for name, sha in meta.blobs.items()},
            meta.clients,
            meta.bytes_up,
            meta.bytes_down,
            None if meta.privacy is None else Ledger(meta.privacy.secret, meta.privacy.rounds),
            meta.rows,
            meta.norms,
            meta.accepted,
            meta.log,
            meta.audit,
            dict(zip(meta.seen, seen, strict=True)),
            {
                client: Leaning(each.bias, None if each.trains is None else frozenset(each.trains), each.apart)
                for client, each in meta.leanings.items()
            },
        )
    except (OSError, KeyError, ValueError, AdapterError, MessageError) as error:
        raise ResumeError(
            f"the checkpoint cannot be read ({error})",
            where=str(path),
            mend="Delete this folder to use the one before.",
        ) from None


def _stacked(trees: list[Tree]) -> Tree:
    """Trees of one layout as one, whose tensors ``[K, ..]`` hold the tensor of each."""
    return Tree.of({key: np.stack([tree[key] for tree in trees]) for key in trees[0]})


def _unstacked(tree: Tree, count: int) -> list[Tree]:
    return [Tree.of({key: value[number] for key, value in tree.items()}) for number in range(count)]


def _read_meta(path: Path) -> _Meta:
    raw = parse_json(path.read_bytes())
    if not isinstance(raw, dict):
        raise ValueError(f"{path.name} is not what was written")  # noqa: TRY004 - what is damaged is no wrong type
    if raw.get("format") != _FORMAT:
        raise ResumeError(
            f"the checkpoint has format {raw.get('format')!r}, this version reads {_FORMAT}",
            where=str(path),
            mend="Use the version of Molehill that wrote it.",
        )
    if raw.pop("sha256", None) != _meta_digest(raw):
        raise ValueError(f"{path.name} is damaged: it does not fit its digest")
    return _Meta.model_validate(raw)


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _require_digest(path: Path, known: str) -> None:
    if digest_of(path) != known:
        raise ValueError(f"{path.name} is damaged: it does not have the digest that was noted down")


def _refuse_other(path: Path, saved: Identity, wanted: Identity) -> None:
    for name, what in (("config", "configuration"), ("base", "base model")):
        before, now = getattr(saved, name), getattr(wanted, name)
        if before != now:
            raise ResumeError(
                f"the run was started with another {what} (digest {before[:12]}, now {now[:12]})",
                where=str(path),
                mend=f"Resume with the {what} it was started with, or start a new run in another folder.",
            )


def _committed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*") if path.is_dir())


def _blob(path: Path, max_bytes: int) -> Blob:
    data = path.read_bytes()
    if digest(data) != path.name:
        raise MessageError(f"{path.name[:12]} is damaged")
    return Blob(data, path.name, decode_tree(data, max_bytes))
