"""Identities: what the authority signed holds in a real TLS handshake, and files keep it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from pki_lab import HOSTS, Lab

from molehill import pki
from molehill.errors import IdentityError


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("lab"))
    made.server = made.join("coordinator", HOSTS)
    made.client = made.join("lab-1")
    return made


@pytest.fixture
def own(tmp_path):
    """An authority for one test."""
    return Lab(tmp_path)


def context(identity, purpose):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if purpose == "server" else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    made.load_verify_locations(identity.ca)
    made.load_cert_chain(identity.cert, identity.key)
    return made


def handshake(server, client, host="localhost", crl=None):
    """What the server knows of its peer after one message each way; raises what both sides raised, in one."""
    listener = context(server, "server")
    if crl is not None:
        listener.load_verify_locations(crl)
        listener.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    seen, errors = {}, {}

    def serve():
        try:
            with listener.wrap_socket(there, server_side=True) as link:
                seen["peer"] = pki.Certificate.parse(
                    ssl.DER_cert_to_PEM_cert(link.getpeercert(binary_form=True)).encode()
                )
                link.sendall(link.recv(5))
        except (ssl.SSLError, OSError) as error:
            errors["server"] = error
            there.close()

    here, there = socket.socketpair()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context(client, "client").wrap_socket(here, server_hostname=host) as link:
            link.sendall(b"hello")
            seen["echo"] = link.recv(5)
    except (ssl.SSLError, OSError) as error:
        errors["client"] = error
    finally:
        here.close()
        thread.join(10)
    if errors:
        raise ssl.SSLError(str(errors))
    return seen


@pytest.mark.parametrize("host", HOSTS)
def test_mutual_tls_with_what_was_issued(lab, host):
    seen = handshake(lab.server, lab.client, host)
    assert seen["echo"] == b"hello"
    assert (seen["peer"].name, seen["peer"].serial) == ("lab-1", lab.client.certificate.serial)


def test_another_host_name_is_refused(lab):
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(lab.server, lab.client, "elsewhere.example")


def test_a_node_cannot_pass_for_the_server(lab):
    other = lab.join("lab-2")
    with pytest.raises(ssl.SSLError, match=r"unsuitable certificate purpose|unsupported certificate"):
        handshake(other, lab.client)


def test_another_authority_is_refused_by_both_sides(lab, own):
    stranger = own.join("lab-1")
    with pytest.raises(ssl.SSLError):
        handshake(lab.server, stranger)
    (stranger.folder / "ca.pem").write_bytes(lab.client.ca.read_bytes())
    with pytest.raises(ssl.SSLError, match=r"unknown ca|certificate verify failed"):
        handshake(lab.server, stranger)
    with pytest.raises(IdentityError, match=r"cert\.pem: it was not signed by 'molehill'"):
        pki.Identity.load(stranger.folder)


def test_an_expired_certificate_is_refused_and_both_times_are_named(tmp_path):
    then = datetime.now(UTC) - timedelta(days=20)
    lab = Lab(tmp_path, now=then)
    server, client = lab.join("coordinator", HOSTS), lab.join("lab-1", now=then, days=10)
    with pytest.raises(ssl.SSLError, match=r"certificate has expired|certificate expired"):
        handshake(server, client)
    ended = (then + timedelta(days=10)).strftime("%Y-%m-%dT%H:%M:%SZ")
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    with pytest.raises(IdentityError, match=rf"lab-1: it expired at {ended}, and the clock .* says {today}T.*renew"):
        pki.Identity.load(client.folder)


def test_a_clock_that_is_behind_is_named(lab):
    with pytest.raises(IdentityError, match=r"holds from 2\d{3}-.* on, and the clock of this machine says 2001-01-01"):
        pki.Identity.load(lab.client.folder, now=datetime(2001, 1, 1, tzinfo=UTC))
    soon = datetime.now(UTC) - timedelta(minutes=50)  # nobody's clock is exact
    assert pki.Identity.load(lab.client.folder, now=soon).name == "lab-1"


def test_a_certificate_ends_with_its_authority_at_the_latest(tmp_path):
    lab = Lab(tmp_path, days=5)
    assert lab.join("lab-1", days=365).certificate.ends == lab.authority.certificate.ends
    csr = pki.request(tmp_path / "late", "lab-2")
    with pytest.raises(IdentityError, match="it expired"):
        lab.authority.sign(csr, now=datetime.now(UTC) + timedelta(days=6))


def test_a_revoked_node_is_in_the_list_and_in_the_signed_list(own):
    server, client, other = own.join("coordinator", HOSTS), own.join("lab-1"), own.join("lab-2")
    revoked, crl = pki.Revoked(own.authority.folder / "revoked.json"), own.authority.folder / "revoked.crl"
    assert client.certificate not in revoked
    assert handshake(server, client, crl=crl)["echo"] == b"hello"

    assert [row.name for row in own.authority.revoke("lab-1")] == ["lab-1"]
    assert client.certificate in revoked  # read again
    assert other.certificate not in revoked
    assert json.loads((own.authority.folder / "revoked.json").read_text()) == [client.certificate.serial]
    with pytest.raises(ssl.SSLError, match="certificate revoked"):
        handshake(server, client, crl=crl)
    assert handshake(server, other, crl=crl)["echo"] == b"hello"
    signed = x509.load_pem_x509_crl(crl.read_bytes())
    assert signed.is_signature_valid(own.authority.certificate.public_key)
    assert own.authority.revoke("lab-1") == []  # and nothing else changes
    assert [row.name for row in own.authority.revoke(other.certificate.serial.upper())] == ["lab-2"]
    with pytest.raises(IdentityError, match="no certificate was issued for 'lab-9'"):
        own.authority.revoke("lab-9")


def test_a_list_of_revoked_that_cannot_be_read_lets_nobody_in(lab, tmp_path):
    path = tmp_path / "revoked.json"
    with pytest.raises(IdentityError, match="cannot read it"):
        pki.Revoked(path)
    path.write_text("[]")
    revoked = pki.Revoked(path)
    path.write_text("[no list")
    with pytest.raises(IdentityError, match="not a list of serial numbers"):
        _ = lab.client.certificate in revoked


def test_secrets_are_for_their_owner_only(lab, own):
    old = os.umask(0)
    try:
        Lab(own.folder / "wide").join("lab-1")
    finally:
        os.umask(old)
    for folder in (own.folder / "wide" / "ca" / "ca.key", own.folder / "wide" / "lab-1" / "key.pem"):
        assert folder.stat().st_mode & 0o777 == 0o600
    identity = own.join("lab-1")
    identity.key.chmod(0o640)
    with pytest.raises(IdentityError, match=r"key\.pem: other users can read this secret\. Run: chmod 600"):
        pki.Identity.load(identity.folder)
    (own.folder / "ca" / "ca.key").chmod(0o604)
    with pytest.raises(IdentityError, match=r"ca\.key: other users can read"):
        own.authority.revoke("lab-1")


def test_keys_with_a_passphrase(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    passphrase = pki.read_passphrase(secret)
    assert passphrase == b"correct horse"
    authority = pki.Authority.create(tmp_path / "ca", passphrase=passphrase)
    folder = tmp_path / "lab-1"
    csr = pki.request(folder, "lab-1", passphrase=passphrase)
    for path in (tmp_path / "ca" / "ca.key", folder / "key.pem"):
        assert path.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    with pytest.raises(IdentityError, match=r"ca\.key: the key is encrypted\. Give its passphrase"):
        pki.Authority(tmp_path / "ca").sign(csr)
    with pytest.raises(IdentityError, match="the passphrase is wrong"):
        pki.Authority(tmp_path / "ca", b"battery").sign(csr)
    _, bundle = authority.sign(csr)
    identity = pki.install(bundle, folder, passphrase=passphrase)
    assert b"ENCRYPTED" not in identity.key_pem()
    assert b"ENCRYPTED" in identity.key.read_bytes()
    with pytest.raises(IdentityError, match="the key is encrypted"):
        pki.Identity.load(folder)
    link = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    link.load_cert_chain(identity.cert, identity.key, password=passphrase)

    plain = Lab(tmp_path / "plain").join("lab-1")
    with pytest.raises(IdentityError, match="the key has no passphrase"):
        pki.Identity.load(plain.folder, passphrase=b"x")
    secret.chmod(0o644)
    with pytest.raises(IdentityError, match="other users can read this secret"):
        pki.read_passphrase(secret)
    secret.write_text("\n")
    secret.chmod(0o600)
    with pytest.raises(IdentityError, match="no passphrase"):
        pki.read_passphrase(secret)


def test_flower_takes_the_same_key(lab, tmp_path):
    from argparse import Namespace

    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    path = lab.client.openssh_private_key(tmp_path / "node")
    assert path.stat().st_mode & 0o777 == 0o600
    arguments = Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
    private, public = _try_setup_client_authentication(arguments)
    assert private.public_key() == lab.client.certificate.public_key
    (tmp_path / "node.pub").write_text(lab.authority.issued()[1].public_key + "\n")
    assert try_load_public_key(tmp_path / "node.pub") == public_key_to_bytes(public)


def test_a_renewal_changes_key_and_certificate_and_nothing_before_that(own):
    server, client = own.join("coordinator", HOSTS), own.join("lab-1")
    with pytest.raises(IdentityError, match=r"key\.pem: there is a key already\. Renew it with --renew"):
        pki.request(client.folder, "lab-1")
    csr = pki.request(client.folder, renew=True)
    assert pki.Identity.load(client.folder).certificate == client.certificate
    with pytest.raises(IdentityError, match=r"key\.new\.pem: there is a key already"):
        pki.request(client.folder, renew=True)
    _, bundle = own.authority.sign(csr, replace_living=True)
    renewed = pki.install(bundle, client.folder)
    assert renewed.name == "lab-1"
    assert renewed.certificate.public_key != client.certificate.public_key
    assert not (client.folder / "key.new.pem").exists()
    assert handshake(server, renewed)["peer"].serial == renewed.certificate.serial
    assert client.certificate in pki.Revoked(own.authority.folder / "revoked.json")

    csr = pki.request(server.folder, renew=True)
    _, bundle = own.authority.sign(csr, server=True, replace_living=True)
    assert pki.install(bundle, server.folder).certificate.hosts == HOSTS


def test_an_install_that_was_killed_can_be_repeated(own):
    client = own.join("lab-1")
    _, bundle = own.authority.sign(pki.request(client.folder, renew=True), replace_living=True)
    (client.folder / "key.new.pem").replace(client.key)  # the last thing it did
    with pytest.raises(IdentityError, match=r"key and certificate do not belong together.*pki install"):
        pki.Identity.load(client.folder)
    assert pki.install(bundle, client.folder) == pki.Identity.load(client.folder)


def test_the_same_key_can_be_certified_for_longer(own):
    client = own.join("lab-1", days=30)
    longer, bundle = own.authority.sign(client.folder / "request.csr", days=300)
    assert pki.install(bundle, client.folder).certificate.ends == longer.ends
    assert [row.state(datetime.now(UTC)) for row in own.authority.issued()] == ["living", "living"]


def test_what_is_installed_must_fit(own, lab):
    client, other = own.join("lab-1"), own.join("lab-2")
    bundle = own.authority.folder / "issued" / "lab-2.pem"
    with pytest.raises(IdentityError, match=r"lab-2\.pem: it is for a key that is not in .*lab-1"):
        pki.install(bundle, client.folder)
    with pytest.raises(IdentityError, match="there is no key in"):
        pki.install(bundle, own.folder / "nowhere")
    with pytest.raises(IdentityError, match="comes from another authority"):
        pki.install(lab.authority.folder / "issued" / "lab-1.pem", other.folder)
    with pytest.raises(IdentityError, match="the authority's fingerprint is"):
        pki.install(bundle, other.folder, fingerprint="00" * 32)
    fingerprint = own.authority.certificate.fingerprint
    colons = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    assert pki.install(bundle, other.folder, fingerprint=colons) == other
    with pytest.raises(IdentityError, match="1 certificates where 2 should be"):
        pki.install(other.cert, other.folder)


def test_an_identity_with_a_missing_or_foreign_part_is_refused(own, lab):
    client = own.join("lab-1")
    with pytest.raises(IdentityError, match="there is no identity here"):
        pki.Identity.load(own.folder / "nowhere")
    with pytest.raises(IdentityError, match="the certificate of lab-1 is for a client, not for a server"):
        pki.Identity.load(client.folder, usage="server")
    assert pki.Identity.load(lab.server.folder, usage="client").name == "coordinator"
    whole = client.cert.read_bytes()
    client.cert.write_bytes(whole[:200])
    with pytest.raises(IdentityError, match=r"cert\.pem: not a certificate"):
        pki.Identity.load(client.folder)
    client.cert.write_bytes((own.folder / "ca" / "ca.pem").read_bytes())
    with pytest.raises(IdentityError, match="do not belong together"):
        pki.Identity.load(client.folder)
    client.cert.unlink()
    with pytest.raises(IdentityError, match=r"there is no cert\.pem\. Have request\.csr signed"):
        pki.Identity.load(client.folder)
    client.key.write_text("nothing")
    client.cert.write_bytes(whole)
    with pytest.raises(IdentityError, match=r"key\.pem: not a private key"):
        pki.Identity.load(client.folder)


def test_the_key_in_an_identity_is_not_printed(lab):
    assert "PrivateKey" not in repr(lab.client)


def test_openssl_agrees(lab):
    chain = ["-CAfile", lab.client.ca, "-x509_strict"]
    for identity, purpose in ((lab.client, "sslclient"), (lab.server, "sslserver"), (lab.server, "sslclient")):
        command = ["openssl", "verify", *chain, "-purpose", purpose, identity.cert]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_passphrase_that_can_be_read_only_once_is_refused_where_it_is_needed_again(tmp_path):
    path = tmp_path / "passphrase"
    path.write_text("secret\n")
    pki.require_lasting(path)
    pki.require_lasting(None)
    pki.require_lasting(tmp_path / "missing")  # which whoever reads it says
    reading, writing = os.pipe()
    try:
        with pytest.raises(IdentityError, match="must be in a file"):
            pki.require_lasting(Path(f"/dev/fd/{reading}"))
    finally:
        os.close(reading)
        os.close(writing)
