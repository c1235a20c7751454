"""Trees in safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from molehill.errors import AdapterError, MessageError
from molehill.tensors import pack, write
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree

_DIGEST = "sha256"
_MEND = "Restore the file or make it again."


def save_tree(path: Path, tree: Tree, meta: Mapping[str, str] | None = None) -> None:
    """Write a tree; the file is replaced at once or, when interrupted, not at all.

    Equal trees with equal strings are equal files. The digest of both is kept with them.

    Args:
        path: The file; its folder must exist.
        tree: What to write, under its wire names.
        meta: Strings to keep beside it.

    Raises:
        OSError: The disk is full, or fails.
    """
    said = dict(meta or {})
    write(path, {key.name: array for key, array in tree.items()}, {**said, _DIGEST: _digest(tree, said)})


def load_tree(path: Path) -> tuple[Tree, dict[str, str]]:
    """Read what `save_tree` wrote.

    Returns:
        The tree, with a vector of its own, and the strings beside it.

    Raises:
        AdapterError: The file is missing or damaged, or holds something other than named float32 tensors.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = {Key.parse(name): name for name in file.keys()}  # noqa: SIM118 - not a mapping
            tree = Tree(Layout({key: tuple(file.get_slice(name).get_shape()) for key, name in names.items()}))
            for key, view in tree.items():
                array = file.get_tensor(names[key])
                if array.dtype != np.float32:
                    raise AdapterError(f"tensor {key.name} is {array.dtype}, not float32", where=str(path))
                view[...] = array
            said = dict(file.metadata() or {})
    except (OSError, SafetensorError, MessageError) as error:
        raise AdapterError(f"cannot read tensors ({error})", where=str(path), mend=_MEND) from None
    kept = said.pop(_DIGEST, None)
    if kept is not None and kept != _digest(tree, said):
        raise AdapterError(
            "the file was damaged: its tensors do not have the digest in it", where=str(path), mend=_MEND
        )
    return tree, said


def pack_tree(tree: Tree) -> bytes:
    """A tree as `save_tree` writes it, in memory and without strings."""
    return pack({key.name: array for key, array in tree.items()}, {})[0]


def unpack_tree(data: bytes, where: str = "") -> Tree:
    """Undo `pack_tree`.

    Raises:
        AdapterError: It is damaged, or holds something other than named float32 tensors.
    """
    try:
        arrays = {Key.parse(name): array for name, array in load(data).items()}
    except (SafetensorError, MessageError) as error:
        raise AdapterError(f"cannot read tensors ({error})", where=where) from None
    for key, array in arrays.items():
        if array.dtype != np.float32:
            raise AdapterError(f"tensor {key.name} is {array.dtype}, not float32", where=where)
    return Tree.of(arrays)


def _digest(tree: Tree, meta: Mapping[str, str]) -> str:
    """SHA-256 (hex) of a tree, as it is now, and the strings beside it."""
    total = hashlib.sha256(json.dumps([tree.layout.digest, meta], sort_keys=True).encode())
    total.update(tree.flat.astype("<f4", copy=False).tobytes())
    return total.hexdigest()
