"""Files of their owner, full disks in words, JSON that was made to do harm, and tensors that are equal bytes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from molehill import files, tensors
from molehill.errors import AdapterError, DeployError
from molehill.wire.keys import Key
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Tree


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_what_is_made_in_private_is_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.private(), files.private():
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "by hand").write_text("x")
            files.write(tmp_path / "folder" / "by us", b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o700, "by hand": 0o600, "by us": 0o600}


def test_a_folder_that_is_made_outlives_a_crash(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("molehill.files.sync", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert set(synced) == {tmp_path, tmp_path / "a"}


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "Make room there"), (errno.EDQUOT, "Make room there"), (errno.EIO, "Mend it, then resume")],
)
def test_what_the_system_refuses_is_told(tmp_path, number, mend):
    with (
        pytest.raises(DeployError, match=rf"the run cannot go on: .*\. {mend}") as caught,
        files.told("the run", tmp_path),
    ):
        raise OSError(number, os.strerror(number))
    assert (caught.value.where, caught.value.exit_code) == (str(tmp_path), 11)


def test_a_full_disk_says_which_file(tmp_path):
    def full():
        yield b"x"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        files.write(tmp_path / "x", full())
    assert caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_others_write_is_there_whole_or_not_at_all(tmp_path, number):
    path = tmp_path / "x"
    with files.replacing(path) as part:
        part.write_bytes(b"one")
        assert not path.exists()

    def fail():
        with files.replacing(path) as part:
            part.write_bytes(b"two")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        fail()
    assert caught.value.filename == str(path)
    assert files.cure(caught.value, "Mend it.") == ("Make room on that disk." if number == errno.ENOSPC else "Mend it.")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("x", b"one")]


def test_what_there_is_no_room_for_is_not_begun(tmp_path, monkeypatch):
    room, asked = SimpleNamespace(total=1000, free=300), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or room)

    def begin(*needed):
        files.require_room("the thing", *needed, kind=DeployError, mend="Make room.")

    begin((tmp_path / "a" / "b", 300))
    begin((tmp_path, 300), (Path("/proc"), 300))  # each on a disk of its own
    assert asked == [tmp_path, tmp_path, Path("/proc")]
    with pytest.raises(DeployError) as caught:
        begin((tmp_path / "a", 1_000_000), (tmp_path, 1))
    assert str(caught.value) == f"{tmp_path / 'a'}: the thing needs 1,000,001 bytes, and 300 are free. Make room."
    room.total = 0  # a file system that does not say
    begin((tmp_path, 301))


def test_json_without_end_is_a_value_error():
    for text in ("[" * 100_000, '{"a":' * 100_000, "{"):
        with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
            files.parse_json(text)


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / "a").mkdir()
    for name in (".x.0123456789abcdef.part", "x", ".y", "a/.z.0123456789abcdef.part"):
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".y", "a", "x"]


def tree(value=1.0) -> Tree:
    return Tree.of({Key("site", f"e{n}", kind): np.full((2, 3), value, np.float32) for n in (0, 1) for kind in "AB"})


def test_equal_trees_are_equal_files_that_the_library_reads(tmp_path):
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        save_tree(path, tree(), dict(sorted({"base": "b", "round": "3", "rows": "r"}.items(), reverse=number % 2)))
        written.add(path.read_bytes())
    assert len(written) == 1
    assert {name: value.tolist() for name, value in load_file(path).items()} == {
        key.name: value.tolist() for key, value in tree().items()
    }
    assert load_tree(path)[1] == {"base": "b", "round": "3", "rows": "r"}


def test_a_flipped_bit_is_noticed_in_tensors_names_and_strings(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tree(path, tree(0.123), {"base": "b" * 8, "round": "3"})
    whole = path.read_bytes()
    same = 0
    for spot in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[spot] ^= 4
        path.write_bytes(changed)
        try:
            back, meta = load_tree(path)
        except AdapterError:
            continue
        assert back.digest == tree(0.123).digest  # the name of the digest itself was hit, or padding
        assert {"base", "round"} <= meta.keys()
        same += 1
    assert same < len("sha256") + 64


def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_dealt():
    code = (
        "from molehill import config, errors\n"
        "from molehill.tasks.rows import Rows\n"
        "from molehill_simulation.data import deal\n"
        "columns = {'text': tuple('abcd'), 'label': tuple('xyxy'), 'owner': ('\\u75c5',) * 2 + ('x',) * 2}\n"
        "by = {'name': 'by_column', 'column': 'owner'}\n"
        "data = config.Data(source='f', clients=2, partition=by, test_fraction=0.5)\n"
        "try:\n    deal(data, Rows(columns, ('f:1', 'f:2', 'f:3', 'f:4'), 'f'), 0)\n"
        "except errors.DataError as error:\n    print(ascii(str(error)))\n"
    )
    for utf8, said in (("0", "no folder can be called '\\u75c5' here"), ("1", "")):
        variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        assert (said in done.stdout) if said else not done.stdout, done.stdout


def test_tensors_of_any_order_and_stride_are_written_alike(tmp_path):
    wide = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors.write(tmp_path / "a", {"x": wide.T, "y": wide}, {})
    tensors.write(tmp_path / "b", {"y": wide.copy(), "x": np.ascontiguousarray(wide.T)}, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    np.testing.assert_array_equal(load_file(tmp_path / "a")["x"], wide.T)
