"""An authority and identities of its own for every test that needs mutual TLS."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)


class Authority:
    """Signs certificates."""

    def __init__(self, folder: Path, name: str = "lab-ca") -> None:
        self._folder = folder / name
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = _name(name)
        self._issued = 0
        self._cert = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, SHA256())
        )

    def issue(
        self, name: str, *, until: timedelta = DAY, extra_names: tuple[str, ...] = (), server: bool = True
    ) -> Path:
        """The identity folder of a machine on 127.0.0.1."""
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        self._issued += 1
        folder = self._folder / str(self._issued)
        folder.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP384R1())
        cert = (
            _builder(_name(name, *extra_names), self._name, key, until)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, SHA256())
        )
        (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / "key.pem").chmod(0o600)
        (folder / "cert.pem").write_bytes(cert.public_bytes(Encoding.PEM))
        (folder / "ca.pem").write_bytes(self._cert.public_bytes(Encoding.PEM))
        return folder


def serial(identity: Path) -> str:
    """The serial number of an identity's certificate, in hexadecimal digits."""
    return f"{x509.load_pem_x509_certificate((identity / 'cert.pem').read_bytes()).serial_number:x}"


def _name(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def _builder(subject, issuer, key, until=DAY):
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now + until)
    )
