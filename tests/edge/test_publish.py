"""A repository of bundles: what is signed, what is refused, and what a crash leaves."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
import typer
from edge_bundles import FILES, Memory, make_bundle
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from molehill import files
from molehill.errors import BundleError, IdentityError, TrustError
from molehill_edge import archive, fetch
from molehill_edge.store import Store
from molehill_export.commands import publish as commands
from molehill_export.keys import Keys
from molehill_export.metadata import Lifetimes
from molehill_export.repository import Repository

OPENED = "--keys keys --passphrase-file secret --online-passphrase-file online"
NEW = {"experts.safetensors": b"experts of the second version"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    keys = Keys.create(folder / "keys", b"secret", b"online")
    Repository(folder / "repo", keys).publish(make_bundle(folder / "v1"))
    return folder


@pytest.fixture
def home(template, tmp_path):
    shutil.copytree(template, tmp_path / "home")
    return tmp_path / "home"


def repository(home, **options):
    return Repository(home / "repo", Keys(home / "keys", b"secret", b"online"), **options)


def pulls(home, **options):
    """What a new device gets."""
    store = Store(home / "device")
    shutil.rmtree(store.folder, ignore_errors=True)
    root = (home / "keys" / "1.root.json").read_bytes()
    server = Memory(home / "repo")
    done = fetch.pull(store, server.address, root=root, fetcher=server, **options)
    with store.admit(done.id) as admitted:
        assert admitted.manifest.version == done.version
    return done


def newest(home, role):
    paths = (home / "repo" / "metadata").glob("timestamp.json" if role == "timestamp" else f"*.{role}.json")
    return max((Metadata.from_file(str(path)).signed for path in paths), key=lambda signed: signed.version)


def days(signed):
    return (signed.expires - datetime.now(UTC)) / timedelta(days=1)


def refused(home, bundle, kind, what):
    before = {path: path.read_bytes() for path in (home / "repo").rglob("*") if path.is_file()}
    with pytest.raises(kind, match=what) as caught:
        repository(home).publish(bundle)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (home / "repo").rglob("*") if path.is_file()} == before


def test_the_first_publication(home):
    metadata = {path.name for path in (home / "repo" / "metadata").iterdir()}
    bins = {f"1.blobs-{n:x}.json" for n in range(16)}
    assert metadata == {"1.root.json", "1.targets.json", "1.snapshot.json", "timestamp.json", *bins}
    assert list(newest(home, "targets").targets) == ["bundles/reviews/manifest.pb"]
    assert len(list((home / "repo" / "targets" / "blobs").iterdir())) == len(FILES)
    lasts = [days(newest(home, role)) for role in ("root", "targets", "blobs-0", "snapshot", "timestamp")]
    assert lasts == pytest.approx([365, 90, 90, 7, 1], abs=0.2)
    assert pulls(home).files == len(FILES)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (home / "repo" / "metadata").iterdir())


def test_a_new_version_copies_and_signs_what_is_new(home):
    done = repository(home).publish(make_bundle(home / "v2", NEW, version=2))
    assert (done.changed, done.new_files, done.new_bytes) == (True, 1, len(NEW["experts.safetensors"]))
    assert done.versions == {"root": 1, "targets": 2, "snapshot": 2, "timestamp": 2}
    assert len(list((home / "repo" / "metadata").glob("2.blobs-*.json"))) == 1
    assert pulls(home).version == 2


def test_two_bundles_share_their_files(home):
    done = repository(home).publish(make_bundle(home / "other", id="other"))
    assert (done.changed, done.new_files) == (True, 0)
    with pytest.raises(BundleError, match="the repository has several bundles: other, reviews"):
        pulls(home)
    assert pulls(home, bundle="other").id == "other"


def test_an_archive(home):
    archive.pack(make_bundle(home / "v2", NEW, version=2), home / "v2.molehill")
    assert repository(home).publish(home / "v2.molehill").version == 2
    assert pulls(home).version == 2
    assert not list((home / "repo").glob(".incoming*"))


def test_the_same_again_is_nothing(home):
    before = {path: path.read_bytes() for path in (home / "repo").rglob("*") if path.is_file()}
    done = repository(home).publish(home / "v1")
    assert (done.changed, done.id, done.version) == (False, "reviews", 1)
    assert {path: path.read_bytes() for path in (home / "repo").rglob("*") if path.is_file()} == before


def test_a_wrong_passphrase_where_there_is_nothing_to_do(home):
    for keys in (Keys(home / "keys", b"wrong", b"online"), Keys(home / "keys", b"secret", b"wrong")):
        with pytest.raises(IdentityError, match="the passphrase is wrong"):
            Repository(home / "repo", keys).publish(home / "v1")
        with pytest.raises(IdentityError, match="the passphrase is wrong"):
            Repository(home / "new", keys).publish(home / "v1")
    assert not (home / "new").exists()


def test_what_is_refused(home):
    other = make_bundle(home / "other", NEW, version=1)
    refused(home, other, BundleError, "version 1 of bundle reviews is not newer than the published 1")
    old = int((datetime.now(UTC) - timedelta(days=1)).timestamp())
    refused(home, make_bundle(home / "old", NEW, version=2, expires=old), BundleError, "expired on")
    damaged = make_bundle(home / "damaged", NEW, version=2)
    (damaged / "base.bin").write_bytes(b"Base" * 500)
    refused(home, damaged, BundleError, "its SHA-256 differs")
    (damaged / "base.bin").unlink()
    refused(home, damaged, BundleError, "cannot copy a file of the bundle: No such file")
    refused(home, home / "nothing", BundleError, "cannot unpack the archive: No such file")
    repository(home).publish(make_bundle(home / "v5", NEW, version=5))
    refused(home, make_bundle(home / "v4", version=4), BundleError, "is not newer than the published 5")


def test_keys_that_cannot_sign(home):
    bundle = make_bundle(home / "v2", NEW, version=2)
    before = sorted((home / "repo" / "metadata").iterdir())
    for keys in (Keys(home / "keys", b"wrong", b"online"), Keys(home / "keys", b"secret", b"wrong")):
        with pytest.raises(IdentityError, match="the passphrase is wrong"):
            Repository(home / "repo", keys).publish(bundle)
    assert (home / "repo" / "metadata" / "timestamp.json") in before
    assert pulls(home).version == 1
    assert repository(home).publish(bundle).version == 2
    assert pulls(home).version == 2


def test_a_repository_that_others_changed_is_not_signed(home):
    """The offline keys sign what was here before as well: so it must be what they signed."""
    bundle = make_bundle(home / "v2", NEW, version=2)
    path = home / "repo" / "metadata" / "1.targets.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"bundles/reviews', b'"bundles/revieww'))
    refused(home, bundle, TrustError, "the metadata are damaged, or others signed them")
    path.unlink()
    refused(home, bundle, TrustError, "cannot read it: No such file")
    path.write_bytes(good)
    stranger = Keys.create(home / "stranger", b"secret")
    with pytest.raises(TrustError, match="the repository has a root that these keys do not have"):
        Repository(home / "repo", stranger).publish(bundle)
    manifest = next((home / "repo" / "targets" / "bundles" / "reviews").iterdir())
    manifest.write_bytes(b"another")
    refused(home, bundle, TrustError, "a published manifest is lost or damaged")


def test_an_older_copy_of_the_keys(home):
    shutil.copytree(home / "keys", home / "older")
    Keys(home / "keys", b"secret", b"online").rotate("timestamp")
    repository(home).publish(make_bundle(home / "v2", NEW, version=2))
    with pytest.raises(TrustError, match="Give the newest copy of the keys"):
        Repository(home / "repo", Keys(home / "older", b"secret", b"online")).refresh()


def test_a_damaged_blob_is_mended(home):
    path = next(
        path for path in (home / "repo" / "targets" / "blobs").iterdir() if path.read_bytes() == FILES["base.bin"]
    )
    path.write_bytes(b"Base" * 500)
    assert repository(home).publish(make_bundle(home / "v2", version=2)).new_files == 1
    assert pulls(home).version == 2


def test_only_the_online_half_keeps_it_alive(home):
    shutil.rmtree(home / "keys" / "offline")
    keys = Keys(home / "keys", None, b"online")
    done = Repository(home / "repo", keys, Lifetimes(snapshot=3, timestamp=2)).refresh()
    assert done.versions == {"root": 1, "targets": 1, "snapshot": 2, "timestamp": 2}
    assert days(newest(home, "timestamp")) == pytest.approx(2, abs=0.1)
    assert pulls(home).version == 1
    with pytest.raises(IdentityError, match="0 keys for targets are here"):
        Repository(home / "repo", keys).publish(make_bundle(home / "v2", NEW, version=2))
    assert pulls(home).version == 1


def test_what_a_refresh_refuses(home):
    with pytest.raises(TrustError, match="there is no repository here"):
        Repository(home / "nothing", Keys(home / "keys")).refresh()
    with pytest.raises(TrustError, match="the signature of targets has expired"):
        repository(home, now=datetime.now(UTC) + timedelta(days=91)).refresh()
    Keys(home / "keys", b"secret", b"online").rotate("targets")
    with pytest.raises(TrustError, match="the key for targets was rotated since"):
        repository(home).refresh()
    with pytest.raises(TrustError, match="the root metadata has expired"):
        repository(home, now=datetime.now(UTC) + timedelta(days=400)).refresh()


def test_all_is_signed_anew(home):
    later = datetime.now(UTC) + timedelta(days=5)
    done = repository(home, now=later).publish(None)
    assert (done.id, done.changed) == ("", False)
    assert done.versions == {"root": 1, "targets": 2, "snapshot": 2, "timestamp": 2}
    assert len(list((home / "repo" / "metadata").glob("2.blobs-*.json"))) == 16
    assert done.ends["targets"] == (later + timedelta(days=90)).replace(microsecond=0)
    assert pulls(home).version == 1


def test_a_publication_also_signs_what_has_lived_half_its_life(home):
    later = datetime.now(UTC) + timedelta(days=50)
    repository(home, now=later).publish(make_bundle(home / "v2", NEW, version=2))
    assert len(list((home / "repo" / "metadata").glob("2.blobs-*.json"))) == 16


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_rotated_key(home, role):
    Keys(home / "keys", b"secret", b"online").rotate(role)
    repository(home).publish(make_bundle(home / "v2", NEW, version=2))
    assert pulls(home).version == 2
    bins = list((home / "repo" / "metadata").glob("2.blobs-*.json"))
    assert len(bins) == (16 if role == "targets" else 1)


def crashes(home, monkeypatch, bundle, places=range(100)):
    """Publish again and again, each time with a crash some writes later, until there is none."""
    shutil.copytree(home / "repo", home / "clean")
    write = files.write
    for count in places:
        shutil.rmtree(home / "repo")
        shutil.copytree(home / "clean", home / "repo")
        left = [count]

        def failing(path, data, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(path, data, **options)

        monkeypatch.setattr(files, "write", failing)
        try:
            repository(home).publish(bundle)
        except KeyboardInterrupt:
            monkeypatch.setattr(files, "write", write)
            yield count
        else:
            break
        finally:
            monkeypatch.setattr(files, "write", write)


def test_a_crash_anywhere_leaves_the_state_before(home, monkeypatch):
    """Each write of a publication fails once: devices get version 1, and the next try publishes version 2."""
    bundle = make_bundle(home / "v2", NEW | {"base.bin": b"new"}, version=2)
    seen = 0
    for _ in crashes(home, monkeypatch, bundle):
        assert pulls(home).version == 1
        repository(home).publish(bundle)
        assert pulls(home).version == 2
        seen += 1
    assert seen == 6  # manifest, two bins, targets, snapshot, timestamp


@pytest.mark.parametrize("role", ["root", "targets", "timestamp"])
def test_a_crash_with_a_rotated_key_is_mended_by_the_next_try(home, monkeypatch, role):
    """Devices get a version or refuse what they see; in the end they get version 2, even after one more rotation."""
    bundle = make_bundle(home / "v2", NEW, version=2)
    Keys(home / "keys", b"secret", b"online").rotate(role)
    shutil.copytree(home / "keys", home / "rotated")
    outcomes = []
    places = (0, 9, 19, 20, 21) if role == "targets" else range(100)  # the last two: the root, and no crash
    for count in crashes(home, monkeypatch, bundle, places):
        try:
            outcomes.append(pulls(home).version)
        except TrustError:
            outcomes.append(0)
        if count % 2:
            Keys(home / "keys", b"secret", b"online").rotate(role)
        repository(home).publish(bundle)
        repository(home).publish(None)
        assert pulls(home).version == 2
        shutil.rmtree(home / "keys")
        shutil.copytree(home / "rotated", home / "keys")
    assert outcomes == [1] * (len(outcomes) - 1) + [2 if role == "root" else 0]


def test_the_first_publication_crashes(tmp_path, template, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(template / "keys", home / "keys")
    (home / "repo").mkdir()
    bundle = make_bundle(home / "v1")
    for _ in crashes(home, monkeypatch, bundle, (0, 9, 18, 19, 20, 21)):  # the last two: the root, and no crash
        repository(home).publish(bundle)
        assert pulls(home).version == 1


@pytest.fixture
def molehill(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("secret", "online"):
        (home / name).write_text(name)
        (home / name).chmod(0o600)
    app = typer.Typer()
    app.command()(commands.publish)
    app.command("other")(lambda: None)
    return lambda line: CliRunner().invoke(app, line.split())


def test_the_command(molehill, home):
    make_bundle(home / "v2", NEW, version=2)
    both = f"--repo repo {OPENED}"
    result = molehill(f"publish v2 {both} --json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["bundle"] == {"id": "reviews", "version": 2}
    assert (shown["changed"], shown["new_files"]) == (True, 1)
    assert {name: part["version"] for name, part in shown["metadata"].items()} == {
        "root": 1,
        "targets": 2,
        "snapshot": 2,
        "timestamp": 2,
    }
    result = molehill(f"publish v2 {both}")
    assert "bundle reviews version 2 is there already" in result.stdout
    result = molehill("publish --refresh --repo repo --keys keys --online-passphrase-file online --json")
    assert json.loads(result.stdout)["bundle"] is None
    result = molehill(f"publish {both}")
    assert "signatures last until: root " in result.stdout
    make_bundle(home / "v3", version=3)
    assert "bundle reviews version 3, 0 new files" in molehill(f"publish v3 {both}").stdout
    assert pulls(home).version == 3


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        ("publish v1 --repo repo --keys keys --refresh", 2, "--refresh publishes no bundle"),
        ("publish v1 --repo repo --keys nothing", 10, "there are no keys of a repository here"),
        (f"publish nothing --repo repo {OPENED}", 13, "cannot unpack the archive"),
        ("publish --refresh --repo nothing --keys keys", 14, "there is no repository here"),
        ("publish --refresh --repo repo --keys keys", 10, "the key is encrypted"),
        (f"publish v1 --repo secret/repo {OPENED}", 10, "cannot read or write there: Not a directory"),
    ],
)
def test_a_mistake_is_one_paragraph(molehill, home, line, code, what):
    result = molehill(line)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert what in result.stderr
    assert result.stdout == ""
