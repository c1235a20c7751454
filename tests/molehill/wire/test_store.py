from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from molehill.errors import AdapterError
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Layout, Tree


def test_a_tree_and_its_strings_come_back(tmp_path: Path, heavy: Tree) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, heavy, {"base": "abc", "round": "3"})
    tree, meta = load_tree(path)
    assert tree.layout == heavy.layout
    assert tree.digest == heavy.digest
    assert meta == {"base": "abc", "round": "3"}
    assert set(load_file(path)) == {key.name for key in heavy}
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_tree_and_no_strings(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", Tree(Layout({})))
    assert load_tree(tmp_path / "t") == (Tree(Layout({})), {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, small: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, small)

    def fail(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        save_tree(path, Tree(small.layout))
    assert load_tree(path)[0].digest == small.digest
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_or_foreign_files_are_refused(tmp_path: Path, small: Tree) -> None:
    path = tmp_path / "tree.safetensors"
    with pytest.raises(AdapterError, match=r"tree\.safetensors"):
        load_tree(path)
    save_tree(path, small)
    whole = path.read_bytes()
    for cut in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(AdapterError, match=r"tree\.safetensors"):
            load_tree(path)
    save_file({"weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(AdapterError, match="bad tensor name"):
        load_tree(path)
    save_file({"a/e0/A": np.zeros(2, np.float64)}, path)
    with pytest.raises(AdapterError, match="float64"):
        load_tree(path)
