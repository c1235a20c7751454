"""What a hostile or broken repository may try against a page; after each, the bundle that was in use still is."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from edge_attacks import NEW, World
from edge_bundles import FILES, make_bundle
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root

from molehill_export.keys import Keys
from molehill_export.repository import Repository
from molehill_protos.v1.bundle_pb2 import Runtime
from molehill_web.site import PAGE
from molehill_web.vendor import RUNTIME

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node here, which runs the page's code without a page")


def coded(files):
    return {name: base64.b64encode(data).decode() for name, data in files.items()}


class Visited(World):
    """An owner, a repository, and a browser that has seen version 1."""

    kept: dict[str, str]

    def __init__(self, folder) -> None:
        super().__init__(folder)
        path = folder / "kept.json"
        self.kept = json.loads(path.read_text()) if path.is_file() else {}
        self.asked: list[str] = []
        self.opened: dict[str, object] = {}

    def look(self, *, root=None, update=True, bundle="reviews"):
        """Ask the repository, if it is to, then open what is kept; returns what came of the first."""
        asked = {
            "pinned": base64.b64encode(root or self.root).decode(), "bundle": bundle, "onnxruntime": RUNTIME.version,
            "files": coded(self.server.files), "cut": self.server.cut, "kept": self.kept, "update": update,
        }  # fmt: skip
        command = [NODE, "--no-warnings", Path(__file__).with_name("device.mjs"), f"{PAGE.as_uri()}/js/"]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        self.kept, self.asked, self.opened = found["kept"], found["asked"], found["opened"]
        assert found["asked_to_open"] == []  # without a network
        return found["said"]

    def pull(self, **options):
        said = self.look(**options)
        assert "refused" not in said, said
        return said

    def refused(self, what, before=1, **options):
        said = self.look(**options)
        assert what in said.get("refused", ""), said
        self.still(before)

    def still(self, version):
        """This version is in use, as it was opened last; None for none."""
        if version is None:
            assert "nothing is kept" in self.opened["refused"]
            return
        assert self.opened == {"bundle": "reviews", "version": version}
        assert len([name for name in self.kept if name.startswith("blob/")]) >= len(FILES) + 1


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    Keys.create(folder / "keys", b"secret")
    world = Visited(folder)
    world.publish(1)
    world.show()
    assert world.pull()["version"] == 1
    (folder / "kept.json").write_text(json.dumps(world.kept))
    return folder


@pytest.fixture
def world(template, tmp_path):
    shutil.copytree(template, tmp_path / "world", symlinks=True)
    return Visited(tmp_path / "world")


def ago(days):
    return datetime.now(UTC) - timedelta(days=days)


def blob(world, name="experts.safetensors"):
    return next(path for path, data in world.server.files.items() if data == (FILES | NEW)[name])


def later(made, days=1):
    made.signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    return made


OLDER = "refused a state that is older than the known one"
EXPIRED = "refused an old state, or one that its owner must sign anew"
UNSIGNED = "refused what is not signed by the keys of its owner"
OTHER = "refused a file other than the signed one"


def test_no_attack(world):
    world.publish(2, NEW)
    world.show()
    found = world.pull()
    assert (found["version"], found["before"], found["bytes"]) == (2, 1, len(NEW["experts.safetensors"]))
    world.still(2)
    assert len([name for name in world.kept if name.startswith("blob/")]) == len(FILES) + 1  # of version 2 alone


def test_an_old_repository_is_shown_again(world):
    shutil.copytree(world.repo, world.folder / "old")
    world.publish(2, NEW)
    world.show()
    world.pull()
    world.server.load(world.folder / "old")
    world.refused(OLDER, before=2)


def test_a_thief_of_the_timestamp_key_shows_an_old_snapshot(world):
    old = world.signed("timestamp").signed.snapshot_meta
    world.publish(2, NEW)
    world.show()
    world.pull()
    made = world.signed("timestamp")
    made.signed.snapshot_meta, made.signed.version = old, made.signed.version + 1
    world.put("timestamp", made)
    world.refused(OLDER, before=2)


def test_a_thief_of_the_online_keys_shows_old_lists(world):
    old = world.signed("snapshot").signed.meta["targets.json"]
    world.publish(2, NEW)
    world.show()
    world.pull()
    made = world.signed("snapshot")
    made.signed.meta["targets.json"], made.signed.version = old, made.signed.version + 1
    world.put("snapshot", made)
    world.refused(OLDER, before=2)


def test_a_list_vanishes_from_the_snapshot(world):
    made = world.signed("snapshot")
    del made.signed.meta["blobs-3.json"]
    made.signed.version += 1
    world.put("snapshot", made)
    world.refused(f"{OLDER}, or mixed: blobs-3.json")


def test_an_owner_who_lists_an_older_bundle(world):
    world.publish(5)
    world.show()
    world.pull()
    for version, what in ((4, "it shows version 4, older than the one in use"), (5, "another bundle as version 5")):
        world.list(make_bundle(world.folder / f"other-{version}", NEW, version=version))
        world.refused(what, before=5)


def test_the_timestamp_has_expired(world):
    world.publish(2, NEW, now=ago(2))
    world.show()
    world.refused(f"{EXPIRED} (or the clock is wrong): timestamp")
    world.kept = {}
    world.refused("timestamp", before=None)


def test_only_the_timestamp_is_signed_again(world):
    world.publish(2, NEW, now=ago(10))
    world.show()
    made = later(world.signed("timestamp"))
    made.signed.version += 1
    world.put("timestamp", made)
    world.refused(f"{EXPIRED} (or the clock is wrong): snapshot")


def test_the_lists_have_expired(world):
    world.publish(2, NEW, now=ago(100))
    world.show()
    world.put("timestamp", later(world.signed("timestamp")))
    made = later(world.signed("snapshot"))
    made.signed.version += 1
    world.put("snapshot", made)
    world.refused(f"{EXPIRED} (or the clock is wrong): targets")


def test_the_root_has_expired(world):
    world.keys.renew(days=1, now=ago(2))
    world.server.files["metadata/2.root.json"] = world.keys.root_path(2).read_bytes()
    world.refused(f"{EXPIRED} (or the clock is wrong): root")


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_two_states_are_mixed(world, role):
    world.publish(2, NEW)
    old = dict(world.server.files)
    world.show()
    world.server.files[f"metadata/2.{role}.json"] = old[f"metadata/1.{role}.json"]
    world.refused(f"{OTHER}: {role}")


def test_two_states_are_mixed_and_listed_without_hashes(world):
    world.publish(2, NEW)
    old = dict(world.server.files)
    world.show()
    made = world.signed("snapshot")
    made.signed.meta["targets.json"] = MetaFile(2)
    made.signed.version += 1
    world.put("snapshot", made)
    world.server.files["metadata/2.targets.json"] = old["metadata/1.targets.json"]
    world.refused(f"{OLDER}, or mixed: targets")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "blobs-0"])
def test_an_unknown_key(world, role):
    world.publish(2, {name: bytes([n]) * 9 for n, name in enumerate(FILES)})
    world.show()
    role = role if role != "blobs-0" else min(n for n in world.server.files if "/2.blobs-" in n)[11:-5]
    made = world.signed(role)
    made.signed.version += 1
    world.put(role, made, signer=CryptoSigner.generate_ed25519())
    world.refused(f"{UNSIGNED}: {role}")


def test_a_root_of_somebody_else(world):
    keys = Keys.create(world.folder / "thief", b"secret")
    keys.renew()
    world.server.files["metadata/2.root.json"] = keys.root_path(2).read_bytes()
    world.refused(f"{UNSIGNED}: root 2")
    del world.server.files["metadata/2.root.json"]
    theirs = (keys.folder / "root.json").read_bytes()
    world.refused("this page trusts another root than at the first visit", root=theirs)


def test_a_root_that_one_of_two_keys_signed_once_or_twice(world):
    world.keys.renew()
    made = Metadata[Root].from_bytes(world.keys.root_path(2).read_bytes())
    _, lost = made.signatures.popitem()
    world.server.files["metadata/2.root.json"] = made.to_bytes()
    world.refused(f"{UNSIGNED}: root 2")
    said = json.loads(made.to_bytes())
    said["signatures"] *= 2
    world.server.files["metadata/2.root.json"] = json.dumps(said).encode()
    world.refused(f"{UNSIGNED}: root 2")
    said["signatures"][1]["keyid"] = lost.keyid
    world.server.files["metadata/2.root.json"] = json.dumps(said).encode()
    world.refused(f"{UNSIGNED}: root 2")


def test_a_whole_repository_of_somebody_else(world):
    keys = Keys.create(world.folder / "thief", b"secret")
    Repository(world.folder / "theirs", keys).publish(make_bundle(world.folder / "evil", NEW, version=9))
    world.server.load(world.folder / "theirs")
    world.refused(UNSIGNED)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], OTHER),
        (lambda data: data + b"!", "refused a file that is longer than it may be"),
        (lambda data: data[:-1], OTHER),
        (lambda data: None, "the server does not give"),
    ],
)
@pytest.mark.parametrize("name", ["experts.safetensors", "manifest.pb"])
def test_a_file_of_the_bundle_is_another(world, name, change, what):
    world.publish(2, NEW)
    world.show()
    data = (world.folder / "bundle-reviews-2" / name).read_bytes()
    path = next(path for path, each in world.server.files.items() if each == data)
    world.server.files[path] = change(data)
    world.server.files = {path: data for path, data in world.server.files.items() if data is not None}
    world.refused(what)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(("timestamp.json", data) for data in (b"", b"{}", b"[" * 5000, b"\xff", b'{"signed": {"_type": "root"}}')),
        *((name, b"{}") for name in ("2.snapshot.json", "2.targets.json", "2.root.json")),
    ],
)
def test_metadata_that_are_none(world, name, data):
    world.publish(2, NEW)
    world.show()
    world.server.files[f"metadata/{name}"] = data
    assert "refused" in world.look()
    world.still(1)


@pytest.mark.parametrize(("name", "size"), [("timestamp.json", 1 << 15), ("2.root.json", 1 << 19)])
def test_metadata_without_end(world, name, size):
    world.server.files[f"metadata/{name}"] = b" " * size
    world.refused("refused a file that is longer than it may be")


def test_a_download_is_cut_and_goes_on_with_what_is_whole(world):
    world.publish(2, {"base.bin": b"other" * 1000, **NEW})
    world.show()
    world.server.cut[blob(world)] = 3
    world.refused("was cut")
    world.server.cut.clear()
    world.pull()
    assert blob(world) in world.asked
    assert not [path for path in world.asked if "blobs" in path and path.startswith("targets") and path != blob(world)]
    world.still(2)


def test_nothing_of_an_expired_bundle_is_downloaded(world):
    world.publish(2, NEW, expires=int(ago(1).timestamp()), now=ago(2))
    world.refresh()
    world.show()
    assert "the bundle expired on" in world.look()["refused"]
    assert not [path for path in world.asked if path.startswith("targets/blobs/")]
    world.still(1)


@pytest.mark.parametrize(
    ("needed", "what"),
    [
        ("99.1", f"the bundle needs onnxruntime 99.1 or newer, and this page has {RUNTIME.version}"),
        (f"{RUNTIME.version}.1", f"the bundle needs onnxruntime {RUNTIME.version}.1 or newer"),
        ("new", "the manifest is not plausible: it does not say which onnxruntime it needs"),
    ],
)
def test_nothing_of_a_bundle_for_a_newer_runtime_is_downloaded(world, needed, what):
    world.list(make_bundle(world.folder / "newer", NEW, version=2, runtime=Runtime(onnxruntime=needed)))
    world.refused(what)
    assert not [path for path in world.asked if path.startswith("targets/blobs/")]


def test_the_runtime_that_a_bundle_needs_is_the_oldest(world):
    for version, needed in enumerate(("1.9.9", RUNTIME.version.rpartition(".")[0], RUNTIME.version), start=2):
        world.publish(version, NEW, runtime=Runtime(onnxruntime=needed))
        world.show()
        assert world.pull()["version"] == version


def test_a_bundle_under_the_name_of_another(world):
    world.list(make_bundle(world.folder / "other", id="other", version=7))
    world.refused("what it shows as bundle reviews is other")


def test_lists_that_do_not_agree_with_the_manifest(world):
    world.publish(2, NEW)
    world.show()
    path = blob(world).rpartition(".")[2]
    role = next(n for n in sorted(world.server.files) if f"blobs/{path}".encode() in world.server.files[n])[11:-5]
    made = world.signed(role)
    made.signed.targets[f"blobs/{path}"].length += 1
    made.signed.version += 1
    world.put(role, made)
    world.refused("does not name experts.safetensors as its manifest does")


def test_keys_are_renewed_and_rotated(world):
    world.keys.renew()
    world.keys.rotate("timestamp")
    world.keys.rotate("targets")
    world.publish(2, NEW)
    world.show()
    assert world.pull()["version"] == 2
    world.still(2)
    newest = world.keys.roots()[-1]
    assert world.pull(root=world.keys.root_path(newest.signed.version).read_bytes())["version"] == 2  # a newer page


@pytest.mark.parametrize("name", ["pinned", "list/", "current"])
def test_what_the_browser_keeps_is_not_believed_unseen(world, name):
    name = next(each for each in world.kept if each.startswith(name))
    said = json.loads(base64.b64decode(world.kept[name]))
    if name == "current":
        said["manifest"] = "0" * 64
    else:
        said["signed"]["version"] += 1
    world.kept[name] = base64.b64encode(json.dumps(said).encode()).decode()
    world.look(update=False)
    assert "refused" in world.opened
