"""Trees in safetensors files."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from molehill.errors import AdapterError, MessageError
from molehill.files import sync
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree


def save_tree(path: Path, tree: Tree, meta: Mapping[str, str] | None = None) -> None:
    """Write a tree; the file is replaced at once or, when interrupted, not at all.

    Args:
        path: The file; its folder must exist.
        tree: What to write, under its wire names.
        meta: Strings to keep beside it.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        save_file({key.name: array for key, array in tree.items()}, part, metadata=dict(meta) if meta else None)
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


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
            return tree, dict(file.metadata() or {})
    except (OSError, SafetensorError, MessageError) as error:
        raise AdapterError(
            f"cannot read tensors ({error})", where=str(path), mend="Restore the file or make it again."
        ) from None


def pack_tree(tree: Tree) -> bytes:
    """A tree as `save_tree` writes it, in memory and without strings."""
    return save({key.name: np.ascontiguousarray(array) for key, array in tree.items()})


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
