"""Signatures between the machines of a federation."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from tiny_pki import Authority

from molehill.errors import IdentityError
from molehill.pki import Identity, Signer


@pytest.fixture
def lab(tmp_path):
    return Authority(tmp_path)


def signer(authority, name, **given):
    return Signer(Identity.load(authority.issue(name, **{"server": False, **given})))


def test_machines_of_one_authority_believe_each_other(lab):
    one, other = signer(lab, "lab-1"), signer(lab, "lab-2")
    one.verify("lab-2", b"data", other.sign(b"data"))
    one.verify("lab-1", b"data", one.sign(b"data"))


def test_whatever_else_is_refused(lab, tmp_path):
    one, other, foreign = signer(lab, "lab-1"), signer(lab, "lab-2"), signer(Authority(tmp_path, "evil"), "lab-2")
    proof = json.loads(other.sign(b"data"))
    for name, data, given, why in (
        ("lab-2", b"other", json.dumps(proof), "not for these bytes"),
        ("lab-3", b"data", json.dumps(proof), "made with the certificate of 'lab-2'"),
        ("lab-2", b"data", foreign.sign(b"data"), "not signed by"),
        ("lab-2", b"data", json.dumps({**proof, "signature": ""}), "not for these bytes"),
        ("lab-2", b"data", json.dumps({**proof, "certificate": "x"}), "not a certificate"),
        ("lab-2", b"data", json.dumps({**proof, "certificate": json.loads(one.sign(b""))["certificate"]}), "'lab-1'"),
        ("lab-2", b"data", "", "there is no signature"),
        ("lab-2", b"data", "[1]", "there is no signature"),
        ("lab-2", b"data", '{"certificate": 1, "signature": "x"}', "there is no signature"),
    ):
        with pytest.raises(IdentityError, match=why):
            one.verify(name, data, given)


def test_a_server_vouches_for_nothing(lab):
    """Not even for itself: it may not join the company of the machines that are to be protected from it."""
    server = signer(lab, "coordinator", server=True)
    with pytest.raises(IdentityError, match=r"certificate of a server, which is no owner's machine.*--server"):
        signer(lab, "lab-1").verify("coordinator", b"data", server.sign(b"data"))


def test_an_expired_certificate_vouches_for_nothing(lab):
    folder = lab.issue("lab-2", until=-timedelta(hours=1), server=False)
    other = Signer(Identity.load(folder, now=datetime.now(UTC) - timedelta(hours=2)))
    with pytest.raises(IdentityError, match="expired"):
        signer(lab, "lab-1").verify("lab-2", b"data", other.sign(b"data"))
