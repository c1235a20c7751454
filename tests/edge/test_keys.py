"""Keys of a repository: made, encrypted, replaced."""

from __future__ import annotations

import json
import shutil
import stat
from datetime import UTC, datetime, timedelta

import pytest
import typer
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from molehill.errors import IdentityError, TrustError
from molehill_export.commands import keys as commands
from molehill_export.keys import ROLES, Keys

PASS = b"correct horse"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "keys"
    Keys.create(folder, PASS)
    return folder


@pytest.fixture
def keys(template, tmp_path):
    shutil.copytree(template, tmp_path / "keys")
    return Keys(tmp_path / "keys", PASS)


def pem(keys, role):
    return sorted(keys.folder.glob(f"*/{role}-*.pem"))


def test_what_is_made(keys):
    assert [len(pem(keys, role)) for role in ROLES] == [2, 1, 1, 1]
    for path in keys.folder.rglob("*.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert (path.parent.name == "offline") == path.name.startswith(("root", "targets"))
    (root,) = keys.roots()
    assert root.signed.roles["root"].threshold == 2
    assert {key.keytype for key in root.signed.keys.values()} == {"ed25519"}
    assert len(root.signed.keys) == 5
    assert root.signed.consistent_snapshot
    assert 364 <= (root.signed.expires - datetime.now(UTC)).days <= 365
    assert (keys.folder / "root.json").read_bytes() == keys.root_path(1).read_bytes()


def test_a_passphrase_of_its_own_for_what_is_online(tmp_path):
    Keys.create(tmp_path / "keys", PASS, b"other", threshold=1)
    root = Keys(tmp_path / "keys").roots()[0].signed
    assert root.roles["root"].threshold == 1
    assert Keys(tmp_path / "keys", None, b"other").signers("timestamp", root)
    for wrong in (Keys(tmp_path / "keys", PASS), Keys(tmp_path / "keys", b"other", PASS)):
        with pytest.raises(IdentityError, match="the passphrase is wrong"):
            wrong.signers("timestamp", root)
    with pytest.raises(IdentityError, match="the key is encrypted"):
        Keys(tmp_path / "keys").signers("timestamp", root)


def test_online_keys_in_the_clear_on_demand_only(tmp_path):
    keys = Keys.create(tmp_path / "keys", PASS, plain=True)
    clear = {
        path.name.partition("-")[0] for path in keys.folder.rglob("*.pem") if b"ENCRYPTED" not in path.read_bytes()
    }
    assert clear == {"snapshot", "timestamp"}
    root = keys.roots()[0].signed
    assert Keys(keys.folder).signers("snapshot", root)
    assert Keys(keys.folder, PASS).signers("snapshot", root)
    keys.rotate("targets", plain=True)
    assert b"ENCRYPTED" in pem(keys, "targets")[0].read_bytes()
    with pytest.raises(IdentityError, match="the key is encrypted"):
        Keys(keys.folder).rotate("snapshot")


def test_nothing_is_overwritten(keys):
    with pytest.raises(IdentityError, match="the folder is not empty"):
        Keys.create(keys.folder, PASS)


@pytest.mark.parametrize("role", ROLES)
def test_a_key_is_replaced(keys, role):
    old = keys.roots()[0].signed
    made = keys.rotate(role, days=10).signed
    first, second = keys.roots()
    assert second.signed.version == made.version == 2
    assert (second.signed.expires - datetime.now(UTC)) < timedelta(days=10)
    gone = set(old.roles[role].keyids) - set(made.roles[role].keyids)
    assert len(gone) == 1
    assert not gone & set(made.keys)
    assert [path.name for path in (keys.folder / "retired").iterdir()] == [f"{role}-{gone.pop()[:12]}.pem"]
    assert all(made.roles[other] == old.roles[other] for other in ROLES if other != role)
    assert len(second.signatures) == (3 if role == "root" else 2)
    for root in (first.signed, second.signed):
        root.verify_delegate("root", second.signed_bytes, second.signatures)
    assert (keys.folder / "root.json").read_bytes() == keys.root_path(2).read_bytes()
    for each in ROLES:
        assert keys.signers(each, second.signed)


def test_both_root_keys_one_after_the_other(keys):
    old = set(keys.roots()[0].signed.roles["root"].keyids)
    keys.rotate("root")
    keys.rotate("root")
    assert not old & set(keys.roots()[-1].signed.roles["root"].keyids)
    assert keys.renew(days=5).signed.version == 4
    assert len(Keys(keys.folder, PASS).roots()) == 4


def test_without_the_offline_half(keys):
    shutil.rmtree(keys.folder / "offline")
    root = keys.roots()[0].signed
    assert keys.signers("timestamp", root)
    before = sorted(keys.folder.rglob("*"))
    for change in (lambda: keys.rotate("timestamp"), keys.renew):
        with pytest.raises(IdentityError, match="0 keys for root are here, and 2 must sign"):
            change()
    assert sorted(keys.folder.rglob("*")) == before


def test_keys_that_cannot_be_used(keys):
    root = keys.roots()[0].signed
    (path,) = pem(keys, "targets")
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="other users can read this secret"):
        keys.signers("targets", root)
    path.chmod(0o600)
    data = path.read_bytes()
    path.write_bytes(pem(keys, "timestamp")[0].read_bytes())
    with pytest.raises(IdentityError, match="not the one of its name"):
        keys.signers("targets", root)
    path.write_bytes(data[:100])
    with pytest.raises(IdentityError, match="passphrase is wrong, or the key damaged"):
        keys.signers("targets", root)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-5],
        lambda data: b"{}",
        lambda data: data.replace(b'"threshold":2', b'"threshold":1'),
        lambda data: data.replace(b'"version":2', b'"version":3'),
    ],
)
def test_a_root_that_was_changed(keys, change):
    keys.renew()
    path = keys.root_path(2)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TrustError):
        keys.roots()


def test_a_root_that_skips_a_version(keys):
    keys.renew()
    keys.renew()
    keys.root_path(2).write_bytes(keys.root_path(3).read_bytes())
    with pytest.raises(TrustError, match="this is version 3"):
        keys.roots()
    keys.root_path(1).write_bytes(b"{}")
    with pytest.raises(TrustError, match="damaged or not signed"):
        keys.roots()


@pytest.fixture
def molehill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("correct horse\n")
    (tmp_path / "secret").chmod(0o600)
    app = typer.Typer()
    app.add_typer(commands.app, name="keys")
    return lambda line: CliRunner().invoke(app, line.split())


def test_the_commands(molehill, tmp_path):
    result = molehill("keys init keys --passphrase-file secret --plain-online --threshold 1")
    assert result.exit_code == 0, result.output
    assert "keys/root.json: version 1, until " in result.stdout
    result = molehill("keys rotate keys timestamp --plain-online --passphrase-file secret --json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["version"] == 2
    assert [row["role"] for row in shown["keys"]] == ["root", "root", "snapshot", "targets", "timestamp"]
    assert all(row["here"] for row in shown["keys"])
    result = molehill("keys renew keys --passphrase-file secret --days 9 --json")
    assert json.loads(result.stdout)["version"] == 3
    result = molehill("keys show keys")
    assert result.stdout.count("here") == 5
    assert Metadata.from_file(str(tmp_path / "keys" / "root.json")).signed.version == 3


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("keys init keys", "keys for bundles are kept encrypted"),
        ("keys init keys --passphrase-file nothing", "nothing: cannot read it"),
        ("keys init secret/keys --passphrase-file secret", "cannot read or write there: Not a directory"),
        ("keys show .", "there are no keys of a repository here"),
        ("keys rotate . root", "there are no keys of a repository here"),
        ("keys renew .", "there are no keys of a repository here"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(molehill, tmp_path, line, what):
    result = molehill(line)
    assert result.exit_code == 10, result.output
    assert result.stderr.startswith("error: ")
    assert what in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
