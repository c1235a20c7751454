"""The bundles of a device: kept, checked at every opening, replaced at once or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from edge_attacks import NEW
from edge_bundles import FILES, Memory, make_bundle
from tuf.api.metadata import Metadata

from molehill.errors import BundleError, TrustError
from molehill_edge import fetch
from molehill_edge.store import Store, default_folder
from molehill_export.keys import Keys
from molehill_export.repository import Repository


@pytest.fixture
def world(empty):
    empty.pull(root=empty.root)
    return empty


def blobs(world):
    return {path.read_bytes() for path in (world.store.folder / "blobs" / "sha256").iterdir()}


def test_the_first_pull(empty):
    seen = []
    done = empty.pull(root=empty.root, progress=lambda *parts: seen.append(parts))
    size = sum(map(len, FILES.values()))
    assert (done.id, done.version, done.before, done.files, done.bytes) == ("reviews", 1, None, len(FILES), size)
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    with empty.store.admit("reviews") as admitted:
        for name, data in FILES.items():
            assert (admitted.folder / name).read_bytes() == data
            assert (admitted.folder / name).stat().st_nlink == 2
            assert not (admitted.folder / name).stat().st_mode & 0o222


def test_only_what_is_lacking_is_downloaded(world):
    world.publish(2, NEW)
    done = world.pull()
    assert (done.before, done.version, done.files, done.bytes) == (1, 2, 1, len(NEW["experts.safetensors"]))
    assert world.opened() == 2
    assert blobs(world) == set((FILES | NEW).values())
    world.publish(1, id="other")
    assert world.pull(bundle="other").files == 1  # the experts of version 1, which nothing here had any more
    assert world.opened("other") == 1
    assert [current.id for current in world.store.bundles()] == ["other", "reviews"]


def test_nothing_new_is_a_short_look(world):
    world.server.asked.clear()
    done = world.pull()
    assert (done.before, done.version, done.files) == (1, 1, 0)
    assert [path for path in world.server.asked if "blobs" in path] == []
    assert len(world.server.asked) == 3  # the next root, the timestamp, the manifest


def test_a_look_without_news_keeps_the_newer_signature(world):
    before = world.version
    world.keys.rotate("targets")
    Repository(world.repo, world.keys).publish(None)
    world.server.load(world.repo)
    world.pull()
    current = world.store.current("reviews")
    assert (current.root, current.listed) == (2, 2)
    assert world.version == before
    assert [path.name for path in world.version.glob("*.json")] == ["2.targets.json"]
    assert world.opened() == 1


def test_what_is_in_use_does_not_go_with_what_is_listed_now(world):
    """A device that asks about another bundle learns of a new version of the first, and does not take it."""
    world.publish(2, NEW)
    world.publish(1, id="other")
    world.pull(bundle="other")
    assert world.opened() == 1
    world.keys.rotate("targets")
    world.publish(3)
    world.pull(bundle="other")
    assert world.opened() == 1


def test_expired_metadata_do_not_close_what_is_here(empty):
    """A device without a network goes on; the same metadata would be refused in a pull."""
    now = datetime.now(UTC)
    made = empty.server
    Repository(empty.repo, empty.keys, now=now).publish(None)
    made.load(empty.repo)
    empty.pull(root=empty.root)
    path = next(empty.version.glob("*.targets.json"))
    listed = Metadata.from_file(str(path))
    listed.signed.expires = now.replace(microsecond=0) - timedelta(days=1)
    listed.sign(empty.keys.signers("targets", empty.keys.roots()[0].signed)[0])
    listed.to_file(str(path))
    assert listed.signed.is_expired()
    assert empty.opened() == 1


def test_the_expiry_of_a_bundle_counts_always(empty, monkeypatch):
    soon = int(datetime.now(UTC).timestamp()) + 3600
    empty.publish(2, expires=soon)
    empty.pull(root=empty.root)
    assert empty.opened() == 2
    monkeypatch.setattr("time.time", lambda: soon)
    with pytest.raises(BundleError, match="the bundle expired on"):
        empty.store.admit("reviews")


def test_a_name_that_is_not_here(world):
    for name in ("other", "../reviews", "", "reviews/../reviews", Path("/etc")):
        with pytest.raises(BundleError, match="there is no bundle"):
            world.store.admit(name)


def test_a_local_bundle_is_not_opened_as_if_it_were_signed(world):
    for name in (world.folder / "bundle-reviews-1", str(world.folder / "bundle-reviews-1")):
        with pytest.raises(BundleError, match="nobody has signed: --insecure-local"):
            world.store.admit(name)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def change_list(path):
    path.write_bytes(path.read_bytes().replace(b"bundles/reviews", b"bundles/another"))


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (lambda w: flip(w.version / "files" / "base.bin"), BundleError, "its SHA-256 differs"),
        (lambda w: (w.version / "files" / "base.bin").unlink(), BundleError, "cannot read a file"),
        (lambda w: (w.version / "files" / "manifest.pb").unlink(), BundleError, "there is no bundle here"),
        (lambda w: change_list(w.version / "1.targets.json"), TrustError, "do not hold"),
        (lambda w: (w.version / "1.targets.json").write_bytes(b"{}"), TrustError, "do not hold"),
        (lambda w: (w.version / "1.targets.json").unlink(), TrustError, "do not hold"),
        (lambda w: w.store.repositories()[0].pinned.unlink(), TrustError, "do not hold"),
        (lambda w: w.store.repositories()[0].pinned.write_bytes(b"[]"), TrustError, "do not hold"),
        (lambda w: shutil.rmtree(w.version), BundleError, "the store is damaged"),
        (lambda w: (w.version.parent / "current.json").write_bytes(b"{"), BundleError, "the store is damaged"),
        (lambda w: (w.version.parent / "current.json").write_bytes(b"{}"), BundleError, "the store is damaged"),
    ],
)
def test_what_was_changed_in_the_store_is_not_opened(world, change, kind, what):
    change(world)
    with pytest.raises(kind, match=what) as caught:
        world.store.admit("reviews")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("folder", "../../.."),
        ("folder", ".."),
        ("repository", "/etc"),
        ("id", "other"),
        ("version", "1"),
        ("root", None),
    ],
)
def test_a_pointer_that_leads_elsewhere(world, field, value):
    path = world.version.parent / "current.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(BundleError, match="the store is damaged"):
        world.store.admit("reviews")


def test_a_bundle_of_a_thief_in_the_store(world):
    """Whoever can put files into the store, but cannot sign, gets nothing opened."""
    thief = Keys.create(world.folder / "thief", b"secret")
    repo = world.folder / "theirs"
    Repository(repo, thief).publish(make_bundle(world.folder / "evil", NEW, version=9))
    server = Memory(repo)
    theirs = Store(world.folder / "their-store")
    root = (thief.folder / "root.json").read_bytes()
    fetch.pull(theirs, server.address, root=root, fetcher=server)
    assert theirs.admit("reviews").manifest.version == 9
    home = theirs.folder / "bundles" / "reviews"
    pointer = json.loads((home / "current.json").read_text())
    pointer["repository"] = world.store.current("reviews").repository
    shutil.copytree(home / pointer["folder"], world.version.parent / pointer["folder"])
    (world.version.parent / "current.json").write_text(json.dumps(pointer))
    with pytest.raises(TrustError, match="targets was signed by 0/1 keys"):
        world.store.admit("reviews")


def test_a_signed_manifest_of_another_version(world):
    path = world.version.parent / "current.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(TrustError, match="the manifest is of another bundle or version"):
        world.store.admit("reviews")


@pytest.mark.parametrize("name", ["base.bin", "manifest.pb"])
def test_a_pull_mends_what_is_damaged(world, name):
    flip(world.version / "files" / name)
    with pytest.raises((BundleError, TrustError)):
        world.store.admit("reviews")
    done = world.pull()
    assert done.files == (name == "base.bin")
    assert world.opened() == 1


def test_what_is_open_stays_until_it_is_closed(world):
    admitted = world.store.admit("reviews")
    for version in (2, 3):
        world.publish(version, {"base.bin": bytes([version]) * 99})
        world.pull()
    assert world.opened() == 3
    assert (admitted.folder / "base.bin").read_bytes() == FILES["base.bin"]
    assert len([path for path in world.version.parent.iterdir() if path.is_dir()]) == 2
    admitted.close()
    admitted.close()
    world.publish(4)
    world.pull()
    assert not admitted.folder.exists()
    assert blobs(world) == set(FILES.values())


def test_an_interrupted_switch_leaves_the_old_version(world, monkeypatch):
    world.publish(2, NEW)
    before = world.version
    for name in ("_switch", "collect"):
        with monkeypatch.context() as patch:
            patch.setattr(Store, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                world.pull()
        if name == "_switch":
            assert world.version == before
            assert world.opened() == 1
            assert [path for path in before.parent.iterdir() if path.is_dir()] == [before]
    assert world.opened() == 2
    world.pull()


def test_a_file_system_without_links(empty, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    empty.pull(root=empty.root)
    assert empty.opened() == 1
    assert (empty.version / "files" / "base.bin").stat().st_nlink == 1
    empty.publish(2, NEW)
    assert empty.pull().files == 1


def test_no_room(empty, monkeypatch):
    size = sum(map(len, FILES.values()))
    room = SimpleNamespace(total=1 << 30, free=(64 << 20) + size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    need = rf"store: the download, with what stays free, needs {(64 << 20) + size:,} bytes, and {room.free:,} are free"
    with pytest.raises(BundleError, match=need):
        empty.pull(root=empty.root)
    assert not (empty.store.folder / "blobs").exists()
    room.free += 1
    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
        with pytest.raises(BundleError, match=f"needs {(64 << 20) + 2 * size:,} bytes"):  # it would be there twice
            empty.pull(root=empty.root)
    empty.pull(root=empty.root)
    assert empty.opened() == 1


def test_a_disk_that_is_full_before_its_time(empty, monkeypatch):
    """Others write there as well: nothing of the download stays to keep it full."""
    sync, home = os.fsync, empty.store.folder

    def full(handle):
        if list(home.glob("partial/*")) and list(home.glob("blobs/sha256/*")):  # at the second file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BundleError) as caught:
            empty.pull(root=empty.root)
    said = "cannot use the store: No space left on device. Make room on that disk. Nothing was installed."
    assert str(caught.value) == f"{home}: {said}"
    assert not [
        path for name in ("partial", "blobs", "bundles") for path in home.glob(f"{name}/**/*") if path.is_file()
    ]
    empty.pull(root=empty.root)
    assert empty.opened() == 1


def test_two_at_one_store(world, monkeypatch):
    monkeypatch.setattr("molehill_edge.store._PATIENCE", 0.1)
    with world.store.locked(), pytest.raises(BundleError, match="another process updates this store"):
        world.pull()
    assert world.pull().version == 1


def test_a_store_that_cannot_be_written(empty):
    (empty.folder / "store").write_text("")
    with pytest.raises(BundleError, match="cannot use the store"):
        empty.pull(root=empty.root)


def test_a_repository_that_moved(world):
    """It is who signs it, not where it is; the newest address is remembered."""
    world.publish(2, NEW)
    moved = Memory(world.repo)
    moved.address = "https://moved.example/bundles/"
    with pytest.raises(TrustError, match="this device does not know this repository"):
        fetch.pull(world.store, moved.address, fetcher=moved)
    done = fetch.pull(world.store, moved.address.removesuffix("/"), root=world.root, fetcher=moved)
    assert (done.before, done.version) == (1, 2)
    assert [known.url for known in world.store.repositories()] == [moved.address]
    world.publish(3)
    moved.load(world.repo)
    assert fetch.update(world.store, "reviews", fetcher=moved).version == 3


def test_a_newer_root_of_a_known_repository(world):
    world.keys.rotate("root")
    world.publish(2, NEW)
    world.pull()
    newest = world.keys.root_path(2).read_bytes()
    assert world.pull(root=newest).version == 2
    another = Store(world.folder / "another")
    fetch.pull(another, world.server.address, root=newest, fetcher=world.server)
    assert another.admit("reviews").manifest.version == 2


def test_an_address_that_is_lost(world):
    (world.store.repositories()[0].folder / "url").unlink()
    with pytest.raises(TrustError, match="this is not the address of a repository"):
        fetch.update(world.store, "reviews")
    world.pull(root=world.root)
    assert fetch.update(world.store, "reviews", fetcher=world.server).version == 1


def test_update_what_is_not_here(world):
    with pytest.raises(BundleError, match="there is no bundle other"):
        fetch.update(world.store, "other")


def test_where_bundles_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLEHILL_STORE", str(tmp_path / "mine"))
    assert Store().folder == default_folder() == tmp_path / "mine"
    monkeypatch.delenv("MOLEHILL_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "molehill" / "bundles"
    assert Store(str(tmp_path)).folder == tmp_path


def test_a_first_pull_that_fails_leaves_nothing(empty):
    empty.server.files.clear()
    with pytest.raises(TrustError):
        empty.pull(root=empty.root)
    assert not empty.store.folder.exists()
    empty.store.folder.mkdir()
    with pytest.raises(TrustError):
        empty.pull(root=empty.root)
    assert list(empty.store.folder.iterdir()) == []


def test_a_lock_that_was_taken_away_keeps_nobody_out(tmp_path):
    store = Store(tmp_path / "store")
    with store.locked():
        (store.folder / "lock").unlink()
        with store.locked():
            assert (store.folder / "lock").exists()
    assert list(store.folder.iterdir()) == []
