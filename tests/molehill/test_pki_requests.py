"""What an authority certifies: names, requests and hosts."""

from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pki_lab import Lab

from molehill import pki
from molehill.errors import IdentityError


@pytest.fixture
def own(tmp_path):
    """An authority for one test."""
    return Lab(tmp_path)


def test_two_machines_cannot_have_one_name(own):
    first = own.join("lab-1")
    csr = pki.request(own.folder / "imposter", "lab-1")
    with pytest.raises(IdentityError, match=r"lab-1 has a certificate for another key until 2.*--replace"):
        own.authority.sign(csr)
    assert len(own.authority.issued()) == 1
    made, bundle = own.authority.sign(csr, replace_living=True)
    assert pki.install(bundle, own.folder / "imposter").certificate.serial == made.serial
    assert first.certificate in pki.Revoked(own.authority.folder / "revoked.json")
    assert [row.state(datetime.now(UTC)) for row in own.authority.issued()] == ["revoked", "living"]


def test_a_name_is_free_again_when_its_certificate_has_expired(own):
    own.join("lab-1", days=1)
    csr = pki.request(own.folder / "again", "lab-1")
    own.authority.sign(csr, now=datetime.now(UTC) + timedelta(days=2))


def test_one_key_cannot_have_two_names(own):
    own.join("lab-1")
    key = serialization.load_pem_private_key((own.folder / "lab-1" / "key.pem").read_bytes(), None)
    csr = own.folder / "copied.csr"
    csr.write_bytes(raw_request(key, "lab-2"))
    with pytest.raises(IdentityError, match="the key of lab-2 is that of lab-1"):
        own.authority.sign(csr)


def raw_request(key, *names, extensions=()):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_what_a_request_asks_for_is_not_what_it_gets(own):
    csr = own.folder / "greedy.csr"
    wishes = [x509.BasicConstraints(ca=True, path_length=None), x509.SubjectAlternativeName([x509.DNSName("a.b")])]
    csr.write_bytes(raw_request(ec.generate_private_key(ec.SECP384R1()), "lab-1", extensions=wishes))
    with pytest.raises(IdentityError, match=r"lab-1 asks to be a server, a\.b"):
        own.authority.sign(csr)
    made, _ = own.authority.sign(csr, server=True)
    assert made.hosts == ("a.b",)
    assert not made.x509.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("names", "curve", "what"),
    [
        (["../lab"], ec.SECP384R1(), "'../lab' cannot be the name"),
        (["-x"], ec.SECP384R1(), "cannot be the name"),
        ([], ec.SECP384R1(), "common name"),
        (["a", "b"], ec.SECP384R1(), "common name"),
        (["lab-1"], ec.SECP256R1(), "not on the curve P-384"),
    ],
)
def test_odd_requests_are_refused(own, names, curve, what):
    csr = own.folder / "odd.csr"
    csr.write_bytes(raw_request(ec.generate_private_key(curve), *names))
    with pytest.raises(IdentityError, match=what):
        own.authority.sign(csr)
    assert own.authority.issued() == []


def test_a_request_of_somebody_else_s_key_is_refused(own):
    whole = pki.request(own.folder / "lab-1", "lab-1").read_bytes()
    other = pki.request(own.folder / "lab-2", "lab-2").read_bytes()
    parts = [x509.load_pem_x509_csr(each).public_bytes(serialization.Encoding.DER) for each in (whole, other)]
    ours, theirs = (
        x509.load_pem_x509_csr(each)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for each in (whole, other)
    )
    csr = own.folder / "mixed.csr"
    csr.write_text(
        ssl.DER_cert_to_PEM_cert(parts[0].replace(ours, theirs)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    )
    with pytest.raises(IdentityError, match="does not have its key"):
        own.authority.sign(csr)
    csr.write_text("nonsense")
    with pytest.raises(IdentityError, match="not a certificate signing request"):
        own.authority.sign(csr)


@pytest.mark.parametrize("host", ["https://a", "a:9092", "", "a b", "*.a"])
def test_hosts_are_names_or_addresses(tmp_path, host):
    with pytest.raises(IdentityError, match="neither a host name nor an address"):
        pki.request(tmp_path / "server", "coordinator", hosts=["good.example", host])
    assert not (tmp_path / "server").exists()


def test_an_authority_is_never_overwritten(own):
    before = {path: path.read_bytes() for path in own.authority.folder.iterdir() if path.is_file()}
    with pytest.raises(IdentityError, match="there is a certificate authority already"):
        pki.Authority.create(own.authority.folder)
    (own.authority.folder / "ca.pem").unlink()
    with pytest.raises(IdentityError, match=r"ca\.key: there is a key already"):
        pki.Authority.create(own.authority.folder)
    with pytest.raises(IdentityError, match="no certificate authority here"):
        pki.Authority(own.authority.folder)
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "ca.pem")


def test_signing_at_once_loses_nothing(own):
    requests = [pki.request(own.folder / f"lab-{n}", f"lab-{n}") for n in range(8)]
    threads = [threading.Thread(target=pki.Authority(own.authority.folder).sign, args=[csr]) for csr in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row.name for row in own.authority.issued()} == {f"lab-{n}" for n in range(8)}
