"""The federation's own certificate authority: a folder on a machine that need not be on any network.

``ca.key`` (its owner's only, encrypted when a passphrase is given), ``ca.pem`` (for everybody), ``issued.json`` (every
certificate, in the order of signing), ``issued/NAME.pem`` (the newest one of every name, with ``ca.pem`` behind it),
``revoked.json`` (serial numbers) and ``revoked.crl`` (the same, signed).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from molehill import files
from molehill.errors import IdentityError
from molehill.pki import keys
from molehill.pki.certificate import (
    Certificate,
    alternative_names,
    common_name,
    hosts_of,
    require_name,
    stamp,
)

YEARS = 3650  # days that an authority lasts
YEAR = 365  # days that a node's certificate lasts
_SKEW = timedelta(hours=1)  # clocks in a lab are seldom right
_HASH = hashes.SHA384()


@dataclass(frozen=True)
class Issued:
    """One line of ``issued.json``.

    Attributes:
        name: Whose certificate it is.
        serial: Its number, in hexadecimal.
        server: Whether it may be used by a server.
        hosts: Names and addresses of the server.
        begins: The first moment at which it holds, UTC.
        ends: The last one.
        fingerprint: SHA-256 of the certificate, in hexadecimal.
        public_key: Its key, as one line of OpenSSH.
        revoked: When it was revoked; None when it was not.
    """

    name: str
    serial: str
    server: bool
    hosts: tuple[str, ...]
    begins: str
    ends: str
    fingerprint: str
    public_key: str
    revoked: str | None = None

    def state(self, now: datetime) -> str:
        """``living``, ``expired`` or ``revoked``."""
        if self.revoked is not None:
            return "revoked"
        return "living" if now <= datetime.fromisoformat(self.ends) else "expired"


@dataclass(frozen=True)
class _Request:
    """A certificate signing request that may be signed."""

    name: str
    key: keys.PublicKey
    hosts: tuple[str, ...]


class Authority:
    """A certificate authority in a folder.

    Args:
        folder: The folder; `Authority.create` makes one.
        passphrase: Of its key, which is read when something is signed.

    Raises:
        IdentityError: The folder holds no authority.
    """

    def __init__(self, folder: Path, passphrase: bytes | None = None) -> None:
        self.folder = folder
        self._passphrase = passphrase
        if not (folder / "ca.pem").is_file():
            raise IdentityError(
                "there is no certificate authority here", where=str(folder), mend="Make one: molehill pki init"
            )
        self.certificate = Certificate.load(folder / "ca.pem")

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str = "molehill",
        days: int = YEARS,
        passphrase: bytes | None = None,
        now: datetime | None = None,
    ) -> Authority:
        """Make an authority.

        Args:
            folder: Where; made when missing.
            name: What it is called in certificates.
            days: How long it lasts.
            passphrase: Encrypts its key.
            now: When; this moment when omitted.

        Raises:
            IdentityError: There is one already, or the name cannot be one.
        """
        now = now or datetime.now(UTC)
        subject = _subject(require_name(name))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            if (folder / "ca.pem").exists():
                raise IdentityError(
                    "there is a certificate authority already", where=str(folder), mend="Choose another folder."
                )
            key = keys.new_key()
            keys.save_key(folder / "ca.key", key, passphrase)
            usage = _key_usage(authority=True)
            builder = (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(subject)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - _SKEW)
                .not_valid_after(now + timedelta(days=days))
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(usage, critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            )
            certificate = Certificate(builder.sign(key, _HASH))
            _write(folder, certificate, [], key, now)
            files.write(folder / "ca.pem", certificate.pem)  # last: it makes the folder an authority
        return cls(folder, passphrase)

    def issued(self) -> list[Issued]:
        """Every certificate that was signed, in the order of signing.

        Raises:
            IdentityError: ``issued.json`` is missing or damaged.
        """
        path = self.folder / "issued.json"
        try:
            rows = files.parse_json(keys.read(path))
            return [Issued(**{**row, "hosts": tuple(row["hosts"])}) for row in rows]
        except (ValueError, TypeError, KeyError):
            raise IdentityError("not a list of certificates", where=str(path), mend="Restore it from a copy.") from None

    def sign(
        self,
        request: Path,
        *,
        days: int = YEAR,
        out: Path | None = None,
        server: bool = False,
        replace_living: bool = False,
        now: datetime | None = None,
    ) -> tuple[Certificate, Path]:
        """Certify the key of a request.

        Args:
            request: A certificate signing request, made by ``molehill pki request``.
            days: How long the certificate lasts; it ends with the authority at the latest.
            out: Where the certificate is written, with the authority's behind it; ``issued/NAME.pem`` when omitted.
            server: Whether the machine may be a server. What asks for it in the request is not enough: whoever has
                such a certificate can pass for the coordinator.
            replace_living: Revoke the certificates that the name has for other keys.
            now: When; this moment when omitted.

        Returns:
            The certificate, and where it is.

        Raises:
            IdentityError: The request is damaged or asks for what it may not have, or name or key are in use.
        """
        now = now or datetime.now(UTC)
        wanted = _read_request(request)
        _require_role(wanted, server, str(request))
        self.certificate.require_time(now)
        key = keys.load_key(self.folder / "ca.key", self._passphrase)
        with _locked(self.folder):
            rows = self.issued()
            others = _rivals(rows, wanted, now)
            if others and not replace_living:
                raise IdentityError(
                    f"{wanted.name} has a certificate for another key until {others[0].ends}",
                    where=str(request),
                    mend="Two machines cannot share a name; to put this key in its place, give --replace.",
                )
            certificate = self._certify(wanted, key, days, server, now)
            revoked = {row.serial for row in others}
            rows = [replace(row, revoked=stamp(now)) if row.serial in revoked else row for row in rows]
            _write(
                self.folder, self.certificate, [*rows, _row(certificate)], key, now
            )  # first, so that nothing is out that is not in the list
            path = out or self.folder / "issued" / f"{wanted.name}.pem"
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, certificate.pem + self.certificate.pem)
        return certificate, path

    def revoke(self, name_or_serial: str, *, now: datetime | None = None) -> list[Issued]:
        """Take back what was certified.

        Args:
            name_or_serial: A name, for all its certificates, or the serial number of one.
            now: When; this moment when omitted.

        Returns:
            What is revoked now and was not before.

        Raises:
            IdentityError: There is no such certificate.
        """
        now = now or datetime.now(UTC)
        key = keys.load_key(self.folder / "ca.key", self._passphrase)
        with _locked(self.folder):
            rows = self.issued()
            serial = name_or_serial.lower().replace(":", "").lstrip("0")
            chosen = [row for row in rows if row.name == name_or_serial or row.serial == serial]
            if not chosen:
                raise IdentityError(
                    f"no certificate was issued for {name_or_serial!r}",
                    where=str(self.folder),
                    mend=f"See: molehill pki show {self.folder}",
                )
            fresh = [replace(row, revoked=stamp(now)) for row in chosen if row.state(now) == "living"]
            instead = {row.serial: row for row in fresh}
            rows = [instead.get(row.serial, row) for row in rows]
            _write(self.folder, self.certificate, rows, key, now)
        return fresh

    def _certify(self, wanted: _Request, key: keys.PrivateKey, days: int, server: bool, now: datetime) -> Certificate:
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
        usage = _key_usage(authority=False)
        issuer = self.certificate.public_key
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(wanted.name))
            .issuer_name(self.certificate.x509.subject)
            .public_key(wanted.key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _SKEW, self.certificate.begins))
            .not_valid_after(min(now + timedelta(days=days), self.certificate.ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(wanted.key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        )
        if server:
            builder = builder.add_extension(alternative_names(wanted.hosts), critical=False)
        return Certificate(builder.sign(key, _HASH), f"certificate of {wanted.name}")


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _read_request(path: Path) -> _Request:
    where = str(path)
    try:
        csr = x509.load_pem_x509_csr(keys.read(path))
        hosts = hosts_of(csr.extensions)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise IdentityError("not a certificate signing request in PEM form", where=where) from None
    if not signed:
        raise IdentityError("whoever made the request does not have its key", where=where)
    alternative_names(hosts)
    return _Request(require_name(common_name(csr.subject, where), where), keys.require_p384(key, where), hosts)


def _require_role(wanted: _Request, server: bool, where: str) -> None:
    if wanted.hosts and not server:
        raise IdentityError(
            f"{wanted.name} asks to be a server, {', '.join(wanted.hosts)}",
            where=where,
            mend="Give --server if it is your coordinator; nobody else needs that.",
        )
    if server and not wanted.hosts:
        raise IdentityError(
            "the request names no host", where=where, mend="Make it with: molehill pki request --server --host NAME"
        )


def _rivals(rows: list[Issued], wanted: _Request, now: datetime) -> list[Issued]:
    """Living certificates that the name has for other keys.

    Raises:
        IdentityError: Another name has a certificate for this key.
    """
    line = keys.openssh(wanted.key)
    for row in rows:
        if row.public_key == line and row.name != wanted.name:
            raise IdentityError(
                f"the key of {wanted.name} is that of {row.name}",
                mend="Every machine makes a key of its own: molehill pki request",
            )
    return [row for row in rows if row.name == wanted.name and row.public_key != line and row.state(now) == "living"]


def _row(certificate: Certificate) -> Issued:
    return Issued(
        name=certificate.name,
        serial=certificate.serial,
        server="server" in certificate.usages,
        hosts=certificate.hosts,
        begins=stamp(certificate.begins),
        ends=stamp(certificate.ends),
        fingerprint=certificate.fingerprint,
        public_key=keys.openssh(certificate.public_key),
    )


def _write(folder: Path, authority: Certificate, rows: list[Issued], key: keys.PrivateKey, now: datetime) -> None:
    """Write the list, then what follows from it."""
    files.write(folder / "issued.json", _json([asdict(row) for row in rows]))
    revoked = [row for row in rows if row.revoked is not None]
    files.write(folder / "revoked.json", _json([row.serial for row in revoked]))
    issuer = authority.public_key
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.x509.subject)
        .last_update(now - _SKEW)
        .next_update(authority.ends)  # nobody is there to sign the same list again every month
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )
    for row in revoked:
        assert row.revoked is not None
        crl = crl.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(int(row.serial, 16))
            .revocation_date(datetime.fromisoformat(row.revoked))
            .build()
        )
    files.write(folder / "revoked.crl", crl.sign(key, _HASH).public_bytes(serialization.Encoding.PEM))


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One change of an authority at a time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    """An authority's key signs certificates and lists; everybody else's signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
