"""``molehill pki``, typed as its help says."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from molehill import pki
from molehill.cli import app


@pytest.fixture
def molehill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(app, line.split())


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result, what):
    assert result.exit_code == 10, result.output
    assert result.stdout == ""
    assert what in result.stderr
    assert result.stderr.startswith("error: ")


def test_from_nothing_to_two_identities_and_one_revoked(molehill, tmp_path):
    fingerprint = done(molehill("pki init ca --name our-lab")).split()[-1]
    done(molehill("pki request identity --name lab-1"))
    assert "client lab-1, serial " in done(molehill("pki sign identity/request.csr --ca ca"))
    seen = done(molehill(f"pki install ca/issued/lab-1.pem identity --fingerprint {fingerprint}"))
    assert f"authority our-lab, fingerprint {fingerprint}" in seen
    done(molehill("pki request server --name coordinator --server --host localhost --host 10.0.0.7"))
    refused(molehill("pki sign server/request.csr --ca ca"), "asks to be a server, localhost, 10.0.0.7")
    done(molehill("pki sign server/request.csr --ca ca --server --days 30 --out server.pem"))
    done(molehill("pki install server.pem server"))
    assert pki.Identity.load(tmp_path / "server", usage="server").certificate.hosts == (
        "localhost",
        "10.0.0.7",
        "127.0.0.1",
        "::1",
    )

    listed = json.loads(done(molehill("pki show ca --json")))
    assert listed["kind"] == "authority"
    assert [(row["name"], row["state"]) for row in listed["certificates"]] == [
        ("lab-1", "living"),
        ("coordinator", "living"),
    ]
    own = json.loads(done(molehill("pki show identity --json")))
    assert own["kind"] == "identity"
    assert own["certificates"] == listed["certificates"][:1]
    assert set(own["certificates"][0]) == {"name", "serial", "server", "state", "ends", "days_left", "fingerprint"}
    assert own["certificates"][0]["days_left"] == 364
    table = done(molehill("pki show ca"))
    assert listed["certificates"][1]["fingerprint"] in table
    assert "coordinator" in table

    assert "revoked lab-1" in done(molehill("pki revoke lab-1 --ca ca"))
    assert "nothing to do" in done(molehill("pki revoke lab-1 --ca ca"))
    assert json.loads((tmp_path / "ca" / "revoked.json").read_text()) == [own["certificates"][0]["serial"]]


def test_a_renewal(molehill):
    for line in (
        "pki init ca",
        "pki request identity --name lab-1",
        "pki sign identity/request.csr --ca ca",
        "pki install ca/issued/lab-1.pem identity",
        "pki request identity --renew",
    ):
        done(molehill(line))
    refused(molehill("pki sign identity/request.csr --ca ca"), "--replace")
    done(molehill("pki sign identity/request.csr --ca ca --replace"))
    done(molehill("pki install ca/issued/lab-1.pem identity"))
    states = [row["state"] for row in json.loads(done(molehill("pki show ca --json")))["certificates"]]
    assert states == ["revoked", "living"]


def test_a_passphrase_all_the_way(molehill, tmp_path):
    (tmp_path / "secret").write_text("correct horse\n")
    (tmp_path / "secret").chmod(0o600)
    for line in (
        "pki init ca --passphrase-file secret",
        "pki request identity --name lab-1 --passphrase-file secret",
        "pki sign identity/request.csr --ca ca --passphrase-file secret",
        "pki install ca/issued/lab-1.pem identity --passphrase-file secret",
        "pki show identity",
        "pki revoke lab-1 --ca ca --passphrase-file secret",
    ):
        done(molehill(line))
    refused(molehill("pki revoke lab-1 --ca ca"), "the key is encrypted")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("pki show .", "neither an authority nor an identity"),
        ("pki sign request.csr --ca .", "no certificate authority here"),
        ("pki request identity", "the node needs a name"),
        ("pki request identity --name a/b", "cannot be the name of a node"),
        ("pki request identity --name a --server", "--server and --host go together"),
        ("pki request identity --name a --host b", "--server and --host go together"),
        ("pki request identity --renew", "cert.pem: cannot read it"),
        ("pki install nothing.pem identity", "nothing.pem: cannot read it"),
        ("pki init file/ca", "file/ca: cannot read or write there: Not a directory"),
        ("pki init ca --passphrase-file nothing", "nothing: cannot read it"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(molehill, tmp_path, line, what):
    (tmp_path / "file").write_text("")
    refused(molehill(line), what)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mistake_as_json(molehill):
    result = molehill("pki show nowhere --json")
    assert result.exit_code == 10
    assert json.loads(result.stdout)["error"]["kind"] == "IdentityError"
