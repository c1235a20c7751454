"""A certificate for servers that nobody can reach from another host.

The SuperLink has TLS on loopback only since Flower asks for it to authenticate nodes; the coordinator's own key stays
out of its hands.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from molehill import files

LOOPBACK = "127.0.0.1"
_DAY = timedelta(days=1)


class Pair(NamedTuple):
    """Files in PEM form.

    Attributes:
        cert: The certificate, which is its own authority.
        key: Its private key.
    """

    cert: Path
    key: Path


def pair(folder: Path) -> Pair:
    """Where `renew` writes."""
    return Pair(folder / "loopback.pem", folder / "loopback.key")


def renew(folder: Path) -> Pair:
    """Make a new key and certificate for 127.0.0.1, good for ten years or until the next start."""
    made = pair(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 3650 * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files.write(made.key, secret, mode=files.PRIVATE)
    files.write(made.cert, certificate.public_bytes(Encoding.PEM))
    return made
