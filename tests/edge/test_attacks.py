"""What a hostile or broken repository may try against a device; after each, the bundle that was in use still is."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from datetime import UTC, datetime, timedelta

import pytest
from edge_attacks import NEW, World
from edge_bundles import FILES, Memory, make_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from molehill.errors import BundleError, TrustError
from molehill_edge import fetch
from molehill_edge import manifest as manifests
from molehill_edge.store import Store
from molehill_export.keys import Keys
from molehill_export.repository import Repository
from molehill_protos.v1.bundle_pb2 import Runtime


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    Keys.create(folder / "keys", b"secret")
    world = World(folder)
    world.publish(1)
    world.show()
    world.pull(root=world.root)
    return folder


@pytest.fixture
def world(template, tmp_path):
    shutil.copytree(template, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


def ago(days):
    return datetime.now(UTC) - timedelta(days=days)


def blob(world, name="experts.safetensors"):
    return next(path for path, data in world.server.files.items() if data == (FILES | NEW)[name])


def test_no_attack(world):
    world.publish(2, NEW)
    world.show()
    assert world.pull(bundle="reviews").version == 2
    world.still(2)


def test_rollback_an_old_repository_is_shown_again(world):
    shutil.copytree(world.repo, world.folder / "old")
    world.publish(2, NEW)
    world.show()
    world.pull()
    world.server.load(world.folder / "old")
    world.refused("refused a state that is older than the known one", before=2, bundle="reviews")


def test_rollback_of_the_snapshot_by_a_thief_of_the_timestamp_key(world):
    old = world.signed("timestamp").signed.snapshot_meta
    world.publish(2, NEW)
    world.show()
    world.pull()
    made = world.signed("timestamp")
    made.signed.snapshot_meta, made.signed.version = old, made.signed.version + 1
    world.put("timestamp", made)
    world.refused("refused a state that is older than the known one", before=2, bundle="reviews")


def test_rollback_of_the_lists_by_a_thief_of_the_online_keys(world):
    old = world.signed("snapshot").signed.meta["targets.json"]
    world.publish(2, NEW)
    world.show()
    world.pull()
    made = world.signed("snapshot")
    made.signed.meta["targets.json"], made.signed.version = old, made.signed.version + 1
    world.put("snapshot", made)
    world.refused("refused a state that is older than the known one", before=2, bundle="reviews")


def test_a_list_vanishes_from_the_snapshot(world):
    world.publish(2, NEW)
    world.show()
    made = world.signed("snapshot")
    del made.signed.meta["blobs-3.json"]
    made.signed.version += 1
    world.put("snapshot", made)
    world.refused("is missing info for 'blobs-3.json'", bundle="reviews")


def test_an_owner_who_lists_an_older_bundle(world):
    """No tool of ours does; the device refuses it all the same."""
    world.publish(5)
    world.show()
    world.pull()
    for version, what in (
        (4, "it shows version 4 of bundle reviews, older than the one in use"),
        (5, "it shows another bundle reviews as version 5"),
    ):
        world.list(make_bundle(world.folder / f"other-{version}", NEW, version=version))
        world.refused(what, before=5)


def test_freeze_the_timestamp_has_expired(world):
    world.publish(2, NEW, now=ago(2))
    world.show()
    world.refused("refused an old state, or one that its owner must sign anew")
    store = Store(world.folder / "another")
    with pytest.raises(TrustError, match=r"timestamp\.json is expired"):
        fetch.pull(store, world.server.address, root=world.root, fetcher=world.server)
    assert store.bundles() == store.repositories() == []


def test_freeze_nothing_new_is_shown_until_the_known_state_expires(world):
    made = world.signed("timestamp")
    made.signed.version += 1
    made.signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3)
    world.put("timestamp", made)
    world.pull()
    time.sleep((made.signed.expires - datetime.now(UTC)).total_seconds() + 0.1)
    world.refused("timestamp.json is expired")


def test_freeze_only_the_timestamp_is_signed_again(world):
    world.publish(2, NEW, now=ago(10))
    world.show()
    made = world.signed("timestamp")
    made.signed.version += 1
    made.signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    world.put("timestamp", made)
    world.refused("snapshot.json is expired")


def test_lists_have_expired(world):
    world.publish(2, NEW, now=ago(100))
    shutil.rmtree(world.folder / "bundle-reviews-2")
    made = Metadata.from_file(str(max((world.repo / "metadata").glob("*.targets.json"))))
    world.show()
    assert made.signed.is_expired()
    snapshot = world.signed("snapshot")
    snapshot.signed.version += 1
    snapshot.signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    timestamp = world.signed("timestamp")
    timestamp.signed.expires = snapshot.signed.expires
    world.put("timestamp", timestamp)
    world.put("snapshot", snapshot)
    world.refused("targets is expired")


def test_the_root_has_expired(world):
    world.keys.renew(days=1, now=ago(2))
    world.server.files["metadata/2.root.json"] = (world.folder / "keys" / "2.root.json").read_bytes()
    world.refused("Final root.json is expired")


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_mix_and_match_of_two_states(world, role):
    world.publish(2, NEW)
    old = dict(world.server.files)
    world.show()
    world.server.files[f"metadata/2.{role}.json"] = old[f"metadata/1.{role}.json"]
    world.refused("refused a file other than the signed one")


def test_mix_and_match_without_hashes(world):
    """As a repository of other software may list it: by version only."""
    world.publish(2, NEW)
    old = dict(world.server.files)
    world.show()
    made = world.signed("snapshot")
    made.signed.meta["targets.json"] = MetaFile(2)
    made.signed.version += 1
    world.put("snapshot", made)
    world.server.files["metadata/2.targets.json"] = old["metadata/1.targets.json"]
    world.refused("Expected targets v2, got v1")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "blobs-0"])
def test_an_unknown_key(world, role):
    world.publish(2, {name: bytes([n]) * 9 for n, name in enumerate(FILES)})
    world.show()
    role = role if role != "blobs-0" else min(n for n in world.server.files if "/2.blobs-" in n)[11:-5]
    made = world.signed(role)
    made.signed.version += 1
    world.put(role, made, signer=CryptoSigner.generate_ed25519())
    world.refused(f"refused what is not signed by the keys of its owner: {role} was signed by 0/1 keys")


def test_a_root_of_somebody_else(world):
    keys = Keys.create(world.folder / "thief", b"secret")
    keys.renew()
    world.server.files["metadata/2.root.json"] = keys.root_path(2).read_bytes()
    world.refused("root was signed by 0/2 keys")


def test_a_root_that_one_of_two_keys_signed(world):
    world.keys.renew()
    made = Metadata[Root].from_bytes(world.keys.root_path(2).read_bytes())
    made.signatures.popitem()
    world.server.files["metadata/2.root.json"] = made.to_bytes()
    world.refused("root was signed by 1/2 keys")


def test_a_whole_repository_of_somebody_else(world):
    keys = Keys.create(world.folder / "thief", b"secret")
    repo = world.folder / "theirs"
    Repository(repo, keys).publish(make_bundle(world.folder / "evil", NEW, version=9))
    world.server.load(repo)
    world.refused("refused what is not signed by the keys of its owner")
    with pytest.raises(TrustError, match="this device has pinned another root for this repository"):
        world.pull(root=(keys.folder / "root.json").read_bytes())
    world.still(1)


def test_the_bundle_of_another_repository_under_the_same_name(world):
    keys = Keys.create(world.folder / "second", b"secret")
    repo = world.folder / "theirs"
    Repository(repo, keys).publish(make_bundle(world.folder / "evil", NEW, version=9))
    server = Memory(repo)
    server.address = "https://elsewhere.example/"
    with pytest.raises(TrustError, match="is from another repository"):
        fetch.pull(world.store, server.address, root=(keys.folder / "root.json").read_bytes(), fetcher=server)
    world.still(1)


def test_a_root_that_is_none(world):
    store = Store(world.folder / "another")
    for root, what in (
        (b"", "cannot be used"),
        (b"{}", "cannot be used"),
        (world.server.files["metadata/timestamp.json"], "cannot be used"),
    ):
        with pytest.raises(TrustError, match=what):
            fetch.pull(store, world.server.address, root=root, fetcher=world.server)
    assert store.repositories() == []
    fetch.pull(store, world.server.address, root=world.root, fetcher=world.server)


def test_no_root(world):
    store = Store(world.folder / "another")
    with pytest.raises(TrustError, match="this device does not know this repository"):
        fetch.pull(store, world.server.address, fetcher=world.server)
    assert store.bundles() == []


def flip(data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (flip, "refused a file other than the signed one"),
        (lambda data: data + b"!", "refused a file that is longer than it may be"),
        (lambda data: data * 1000, "refused a file that is longer than it may be"),
        (lambda data: data[:-1], "ends after 28 of 29 bytes"),
        (lambda data: b"", "ends after 0 of 29 bytes"),
    ],
)
def test_a_file_of_the_bundle_is_another(world, change, what):
    world.publish(2, NEW)
    world.show()
    path = blob(world)
    world.server.files[path] = change(world.server.files[path])
    world.refused(what, bundle="reviews")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (flip, "refused a file other than the signed one"),
        (lambda data: data + b"!", "refused a file that is longer than it may be"),
        (lambda data: data[:-1], "refused a file other than the signed one"),
    ],
)
def test_a_manifest_is_another(world, change, what):
    world.publish(2, NEW)
    world.show()
    data = (world.folder / "bundle-reviews-2" / "manifest.pb").read_bytes()
    path = next(path for path, each in world.server.files.items() if each == data)
    world.server.files[path] = change(data)
    world.refused(what)


def test_a_file_is_gone(world):
    world.publish(2, NEW)
    world.show()
    del world.server.files[blob(world)]
    world.refused("the server does not give it: not there")


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 5000, b"\xff\xfe", b'{"signed": {"_type": "root"}, "signatures": []}']
)
def test_metadata_that_are_none(world, name, data):
    world.publish(2, NEW)
    world.show()
    world.server.files[f"metadata/{name}"] = data
    world.refused("refused ")


@pytest.mark.parametrize(("name", "size"), [("timestamp.json", 1 << 15), ("2.root.json", 1 << 19)])
def test_metadata_without_end(world, name, size):
    world.server.files[f"metadata/{name}"] = b" " * size
    world.refused("refused a file that is longer than it may be")


def test_a_cut_download_starts_again(world):
    world.publish(2, {"base.bin": b"other" * 1000, **NEW})
    world.show()
    path = next(path for path, data in world.server.files.items() if data == b"other" * 1000)
    world.server.cut[path] = 2048
    world.refused("was cut", bundle="reviews")
    for left in ("another", path.rpartition(".")[2]):
        (world.store.folder / "partial" / left).write_bytes(b"by a process that was killed")
    world.server.cut.clear()
    assert world.pull().version == 2
    world.still(2)


def test_a_cut_download_keeps_the_files_that_are_whole(world):
    world.publish(2, {"base.bin": b"other" * 1000, **NEW})
    world.show()
    world.server.cut[blob(world)] = 0
    world.refused("was cut")
    world.server.cut.clear()
    done = world.pull()
    assert (done.version, done.files) == (2, 1)
    world.still(2)


def test_a_cut_look(world):
    world.publish(2, NEW)
    world.show()
    world.server.cut["metadata/timestamp.json"] = 0
    world.refused("was cut", bundle="reviews")


def test_the_bundle_in_use_is_refused_by_the_new_manifest_only(world):
    """What is not plausible or has expired is refused before anything of it is downloaded."""
    world.publish(2, NEW, expires=int(ago(1).timestamp()), now=ago(2))
    world.refresh()
    world.show()
    world.server.asked.clear()
    world.refused("the bundle expired on", BundleError, bundle="reviews")
    assert not [path for path in world.server.asked if "blobs/" in path]


def test_nothing_of_a_bundle_for_a_newer_runtime_is_downloaded(world):
    world.list(make_bundle(world.folder / "newer", NEW, version=2, runtime=Runtime(onnxruntime="99.1")))
    world.server.asked.clear()
    here = manifests.installed_runtime()
    what = f"the bundle needs onnxruntime 99.1 or newer, and {here} is installed. Run: pip install 'onnxruntime>=99.1'"
    world.refused(what, BundleError)
    assert not [path for path in world.server.asked if "blobs/" in path]
    world.still(1)


def test_a_bundle_under_the_name_of_another(world):
    world.list(make_bundle(world.folder / "other", id="other", version=7))
    world.refused("what it shows as bundle reviews is bundle other")


def test_a_manifest_without_end(world):
    made = world.signed("targets")
    made.signed.targets["bundles/reviews/manifest.pb"].length = 1 << 40
    made.signed.version += 1
    world.put("targets", made)
    world.refused("the manifest has more than 2 MiB")


def test_lists_that_do_not_agree_with_the_manifest(world):
    world.publish(2, NEW)
    world.show()
    path = blob(world).rpartition(".")[2]
    role = next(n for n in sorted(world.server.files) if f"blobs/{path}".encode() in world.server.files[n])[11:-5]
    made = world.signed(role)
    made.signed.targets[f"blobs/{path}"].length += 1
    made.signed.version += 1
    world.put(role, made)
    world.refused("does not name experts.safetensors as its manifest does", bundle="reviews")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_metadata_at_random(template, data):
    """Whatever is done to the bytes of metadata, nothing but a TrustError comes of it, or nothing at all."""
    with tempfile.TemporaryDirectory() as folder:
        server = Memory(template / "repo")
        name = data.draw(st.sampled_from(sorted(path for path in server.files if path.startswith("metadata/"))))
        changed = bytearray(server.files[name])
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(changed) - 1))
            changed[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        server.files[name] = bytes(changed)
        root = (template / "keys" / "root.json").read_bytes()
        store = Store(folder)
        try:
            fetch.pull(store, server.address, root=root, fetcher=server)
        except TrustError:
            assert store.bundles() == []
        else:
            store.admit("reviews").close()


def test_a_bundle_that_is_not_there(world):
    world.refused("the repository has no bundle other, only: reviews", bundle="other")
    with pytest.raises(BundleError, match="cannot be the id of a bundle"):
        world.pull(bundle="../reviews")


@pytest.mark.parametrize("url", ["ftp://bundles.example", "file:///etc", "bundles.example", "http://", ""])
def test_an_address_that_is_none(world, url):
    with pytest.raises(TrustError, match="this is not the address of a repository"):
        fetch.pull(world.store, url, root=world.root)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_key_is_rotated_and_the_old_one_counts_no_more(world, role):
    old = world.keys.signers(role, world.keys.roots()[-1].signed)[0]
    world.keys.rotate(role)
    world.publish(2, NEW)
    world.show()
    assert world.pull().version == 2
    world.still(2)
    world.publish(3)
    world.show()
    made = world.signed(role)
    made.signed.version += 1
    if role != "root":
        world.put(role, made, signer=old)
        world.refused("refused what is not signed by the keys of its owner", before=2, bundle="reviews")


def test_a_device_that_missed_several_roots(world):
    for role in ("root", "root", "targets", "timestamp"):
        world.keys.rotate(role)
    world.publish(2, NEW)
    world.show()
    world.pull()
    world.still(2)
    assert json.loads((world.store.folder / "bundles" / "reviews" / "current.json").read_text())["root"] == 5


def test_the_kinds_of_metadata_are_told_apart(world):
    assert isinstance(world.signed("timestamp").signed, Timestamp)
    assert isinstance(world.signed("snapshot").signed, Snapshot)
    assert isinstance(world.signed("targets").signed, Targets)
