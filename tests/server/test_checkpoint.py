"""What is read from a checkpoint is what was written, or it is refused."""

from __future__ import annotations

import json
import random
import re
from dataclasses import fields

import numpy as np
import pytest
from toy_federation import initial

from molehill.config import MethodRef
from molehill.errors import ResumeError
from molehill.wire.message import digest, encode_tree
from molehill_server import checkpoint
from molehill_server.broadcast import Blob
from molehill_server.checkpoint import Checkpoint, Identity
from molehill_server.events import Mark
from molehill_server.privacy.accountant import Ledger
from molehill_server.privacy.draw import Round
from molehill_server.records import Global

IDENTITY = Identity("c" * 64, "b" * 64)
FILES = ("meta.json", "tree.safetensors", "patches.safetensors", "state.m.safetensors", "blobs/*")


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with everything, and its folder."""
    tree = initial()
    data = encode_tree(tree, MethodRef(name="fp32"))
    whole = Checkpoint(
        IDENTITY,
        Global(tree, {}, {"m": tree.copy(), "t": 0.1}, 3),
        {"all": Blob(data, digest(data), tree)},
        ("a", "b"),
        5,
        7,
        Ledger(2**127 + 1, (Round(8, 4), Round(8, 8, 0.1))),
        {"a": 10, "b": 20},
        {"kind": (0.1, 2.5)},
        {"a": 3, "b": 1},
        Mark(5, "e" * 64),
        "f" * 64,
    )
    return whole, checkpoint.save(tmp_path / "checkpoints", whole)


def load(folder):
    return checkpoint.load(folder.parent, IDENTITY, 2**24)


def test_a_checkpoint_comes_back(saved):
    whole, folder = saved
    back = load(folder)
    for part in fields(Checkpoint):
        if part.name not in {"glob", "blobs"}:
            assert getattr(back, part.name) == getattr(whole, part.name), part.name
    assert back.glob.tree.digest == whole.glob.tree.digest
    assert back.glob.state["m"].digest == whole.glob.tree.digest
    assert (back.glob.state["t"], back.glob.round) == (0.1, 3)
    assert back.blobs["all"].data == whole.blobs["all"].data


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_in_every_file(saved, name):
    whole, folder = saved
    path = next(folder.glob(name))
    data = path.read_bytes()
    spots = random.Random(0).sample(range(8 * len(data)), 60)
    for spot in spots:
        changed = bytearray(data)
        changed[spot // 8] ^= 1 << spot % 8
        path.write_bytes(changed)
        try:
            back = load(folder)
        except ResumeError as error:
            assert str(folder) in error.where  # noqa: PT017 - a space in JSON may turn into another one
        else:
            assert name == "meta.json"
            assert json.loads(changed) == json.loads(data)
            assert back.accepted == whole.accepted


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["lost", "empty", "halved", "zeroed"])
def test_other_damage_is_noticed_in_every_file(saved, name, damage):
    _, folder = saved
    path = next(folder.glob(name))
    data = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "halved": data[: len(data) // 2], "zeroed": bytes(len(data))}[damage])
    with pytest.raises(ResumeError, match=r"the checkpoint cannot be read .*Delete this folder to use the one before"):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "{", "\xff"])
def test_another_kind_of_json_is_no_traceback(saved, text):
    _, folder = saved
    (folder / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(ResumeError, match=re.escape(str(folder))):
        load(folder)


@pytest.mark.parametrize("text", ["{}", '{"format": 1}', '{"format": 99}', '{"format": [[]]}'])
def test_another_format_says_so(saved, text):
    _, folder = saved
    (folder / "meta.json").write_text(text)
    with pytest.raises(ResumeError, match=r"has format .*, this version reads 2"):
        load(folder)


def test_files_of_another_round_are_noticed(saved, tmp_path):
    whole, folder = saved
    moved = whole.glob.tree.copy()
    moved.flat += np.float32(1)
    other = checkpoint.save(tmp_path / "other", Checkpoint(IDENTITY, Global(moved, {}, {}, 2), {}, ()))
    (folder / "tree.safetensors").write_bytes((other / "tree.safetensors").read_bytes())
    with pytest.raises(ResumeError, match=r"tree\.safetensors is damaged"):
        load(folder)


def test_what_a_killed_run_left_is_removed_and_never_read(saved):
    whole, folder = saved
    for name in (".round-00004", ".round-00001"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "meta.json").write_text("half of")
    assert load(folder).glob.round == 3
    checkpoint.save(folder.parent, whole.__class__(IDENTITY, Global(whole.glob.tree, {}, {}, 4), {}, ()))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["round-00003", "round-00004"]
