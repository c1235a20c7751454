"""What a certificate says, and whether it holds."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from molehill import address
from molehill.errors import IdentityError
from molehill.pki import keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")  # 64 characters are all that X.509 allows
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True)
class Certificate:
    """A certificate of a node, a server or an authority.

    Attributes:
        x509: The certificate.
        where: Where it came from, for errors.
    """

    x509: x509.Certificate
    where: str = ""

    @classmethod
    def parse(cls, pem: bytes, where: str = "") -> Certificate:
        """Read one certificate in PEM form, for example that of a peer.

        Raises:
            IdentityError: It is none.
        """
        (found,) = parse_all(pem, where, 1)
        return found

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Read a certificate from a file.

        Raises:
            IdentityError: It is missing or damaged.
        """
        return cls.parse(keys.read(path), str(path))

    @property
    def name(self) -> str:
        """Whose it is."""
        return common_name(self.x509.subject, self.where)

    @property
    def serial(self) -> str:
        """Its number, in lower-case hexadecimal."""
        return f"{self.x509.serial_number:x}"

    @property
    def begins(self) -> datetime:
        """The first moment at which it holds."""
        return self.x509.not_valid_before_utc

    @property
    def ends(self) -> datetime:
        """The last moment at which it holds."""
        return self.x509.not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole certificate, in hexadecimal."""
        return self.x509.fingerprint(hashes.SHA256()).hex()

    @property
    def public_key(self) -> keys.PublicKey:
        """The key it speaks for."""
        return keys.require_p384(self.x509.public_key(), self.where)

    @property
    def public_pem(self) -> bytes:
        """The same in PEM form, to the byte as Flower's nodes show theirs."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.public_key.public_bytes(serialization.Encoding.PEM, form)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names and addresses of a server."""
        return hosts_of(self.x509.extensions)

    @property
    def usages(self) -> frozenset[str]:
        """``client``, ``server`` or both; nothing for an authority."""
        known = {ExtendedKeyUsageOID.CLIENT_AUTH: "client", ExtendedKeyUsageOID.SERVER_AUTH: "server"}
        try:
            usage = self.x509.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return frozenset()
        return frozenset(known[oid] for oid in usage if oid in known)

    @property
    def pem(self) -> bytes:
        """The certificate in PEM form."""
        return self.x509.public_bytes(serialization.Encoding.PEM)

    def require_time(self, now: datetime | None = None) -> None:
        """Make sure that it holds.

        Args:
            now: When; this moment when omitted.

        Raises:
            IdentityError: It has expired or does not hold yet, or the clock is wrong: both times are named.
        """
        now = now or datetime.now(UTC)
        if self.begins <= now <= self.ends:
            return
        clock = f"the clock of this machine says {stamp(now)}"
        if now < self.begins:
            what, mend = f"it holds from {stamp(self.begins)} on", "Set the clock, or wait."
        else:
            what, mend = f"it expired at {stamp(self.ends)}", "Set the clock, or renew: molehill pki request --renew"
        raise IdentityError(f"{what}, and {clock}", where=f"certificate of {self.name}", mend=mend)

    def require_issuer(self, authority: Certificate) -> None:
        """Make sure that an authority signed it.

        Raises:
            IdentityError: Somebody else did.
        """
        try:
            self.x509.verify_directly_issued_by(authority.x509)
        except (ValueError, TypeError, InvalidSignature):
            raise IdentityError(
                f"it was not signed by {authority.name!r} ({authority.fingerprint[:16]})",
                where=self.where or f"certificate of {self.name}",
                mend="Use a certificate of the federation's own authority.",
            ) from None


def parse_all(pem: bytes, where: str, count: int) -> tuple[Certificate, ...]:
    """Read several certificates from one text.

    Raises:
        IdentityError: It holds something else, or another number of them.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
        _ = [each.extensions for each in found]  # read on demand: better refused here
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension):
        raise IdentityError("not a certificate in PEM form", where=where) from None
    if len(found) != count:
        raise IdentityError(f"{len(found)} certificates where {count} should be", where=where)
    return tuple(Certificate(each, where) for each in found)


def common_name(subject: x509.Name, where: str) -> str:
    """The one common name of a subject.

    Raises:
        IdentityError: There is none, or several.
    """
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise IdentityError("it does not say for whom it is (common name)", where=where)
    return str(names[0].value)


def hosts_of(extensions: x509.Extensions) -> tuple[str, ...]:
    """Names and addresses among the extensions of a certificate or request."""
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(each.value) for each in names if isinstance(each, x509.DNSName | x509.IPAddress))


def alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """Hosts as an extension.

    Raises:
        IdentityError: One is neither a host name nor an address.
    """
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address.bare(host))))
            continue
        except ValueError:
            pass
        if not _HOST.fullmatch(host.lower()):
            raise IdentityError(f"{host!r} is neither a host name nor an address", mend="Leave port and scheme out.")
        names.append(x509.DNSName(host.lower()))
    return x509.SubjectAlternativeName(names)


def require_name(name: str, where: str = "") -> str:
    """A name that can be a client's id, a file's name and a common name.

    Raises:
        IdentityError: It cannot.
    """
    if not _NAME.fullmatch(name):
        mend = "Use up to 64 letters, digits, and . _ @ -, with a letter or digit first."
        raise IdentityError(f"{name[:80]!r} cannot be the name of a node", where=where, mend=mend)
    return name


def stamp(when: datetime) -> str:
    """A time in UTC, for people and for files."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
