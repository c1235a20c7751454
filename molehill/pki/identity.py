"""The identity of one machine: a folder with its key, its certificate and the authority's.

``key.pem`` and ``request.csr`` are made here by ``pki request``; the request is signed elsewhere; ``cert.pem`` and
``ca.pem`` come from that by ``pki install``. While a renewal is under way, its key is ``key.new.pem``.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from molehill import files
from molehill.errors import IdentityError
from molehill.pki import keys
from molehill.pki.certificate import Certificate, alternative_names, parse_all, require_name

Usage = Literal["client", "server"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names that every server has

_KEY, _NEW_KEY, _REQUEST, _CERT, _CA = "key.pem", "key.new.pem", "request.csr", "cert.pem", "ca.pem"


@dataclass(frozen=True)
class Identity:
    """A machine's identity, checked; one and the same for the exchange and for Flower.

    Attributes:
        folder: Where it lies.
        certificate: The machine's.
        authority: Who signed it, and whom the machine trusts.
    """

    folder: Path
    certificate: Certificate
    authority: Certificate
    _key: keys.PrivateKey = field(repr=False, compare=False)
    _passphrase: bytes | None = field(repr=False, compare=False)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        usage: Usage = "client",
        passphrase: bytes | None = None,
        now: datetime | None = None,
    ) -> Identity:
        """Read an identity and make sure that it can be used.

        Args:
            folder: Its folder.
            usage: What for.
            passphrase: Of its key.
            now: When; this moment when omitted.

        Raises:
            IdentityError: A part is missing, damaged or open to others; key and certificate or certificate and
                authority do not belong together; or it is not for now or not for this.
        """
        if not (folder / _KEY).exists():
            raise IdentityError("there is no identity here", where=str(folder), mend="Run: molehill pki request")
        for name in (_CERT, _CA):
            if not (folder / name).exists():
                raise IdentityError(
                    f"there is no {name}",
                    where=str(folder),
                    mend=f"Have {_REQUEST} signed (molehill pki sign), then run: molehill pki install",
                )
        key = keys.load_key(folder / _KEY, passphrase)
        certificate, authority = Certificate.load(folder / _CERT), Certificate.load(folder / _CA)
        if certificate.public_key != key.public_key():
            raise IdentityError(
                "key and certificate do not belong together",
                where=str(folder),
                mend="Install the certificate for this key (again): molehill pki install",
            )
        certificate.require_issuer(authority)
        authority.require_time(now)
        certificate.require_time(now)
        if usage not in certificate.usages:
            can = "a client" if usage == "server" else "a server"
            raise IdentityError(
                f"the certificate of {certificate.name} is for {can}, not for a {usage}",
                where=str(folder),
                mend="Ask for a new one: molehill pki request --server --host NAME" if usage == "server" else "",
            )
        return cls(folder, certificate, authority, key, passphrase)

    @property
    def name(self) -> str:
        """Whose it is."""
        return self.certificate.name

    @property
    def key(self) -> Path:
        """The private key's file; encrypted when it has a passphrase."""
        return self.folder / _KEY

    @property
    def cert(self) -> Path:
        """The certificate's file."""
        return self.folder / _CERT

    @property
    def ca(self) -> Path:
        """The file with the authority's certificate."""
        return self.folder / _CA

    def key_pem(self) -> bytes:
        """The private key in the clear, for a TLS library."""
        return keys.pem(self._key)

    def tls(self, *, server: bool = False) -> ssl.SSLContext:
        """TLS 1.3 in which both sides show a certificate of the same authority.

        Args:
            server: Whether this machine is the one that is called.
        """
        purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
        context = ssl.create_default_context(purpose, cadata=self.authority.pem.decode())
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.cert, self.key, self._passphrase or "")  # with none it must not ask the terminal
        return context

    def sign(self, data: bytes) -> bytes:
        """A signature over bytes (ECDSA with SHA-384); see `molehill.pki.signing.Signer`."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA384()))

    def openssh_private_key(self, path: Path) -> Path:
        """Write the private key in OpenSSH form, in the clear: ``flower-supernode`` takes no other.

        Args:
            path: Where, for its owner's eyes only; a file that is there is replaced.

        Returns:
            The same path.
        """
        data = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        files.write(path, data, mode=files.PRIVATE)
        return path


def request(
    folder: Path,
    name: str | None = None,
    *,
    hosts: Sequence[str] = (),
    passphrase: bytes | None = None,
    renew: bool = False,
) -> Path:
    """Make a key and a request to certify it.

    Args:
        folder: The identity's folder; made when missing.
        name: Of the node; that of the certificate when a renewal leaves it out.
        hosts: Names and addresses of a server, as its clients call it, beside `LOOPBACK`; those of the certificate
            when a renewal leaves them out.
        passphrase: Encrypts the key.
        renew: Make a new key beside the one in use, which stays until the new one is certified.

    Returns:
        The request's file.

    Raises:
        IdentityError: There is a key already, or nothing to renew, or a name or host cannot be one.
    """
    path = folder / (_NEW_KEY if renew else _KEY)
    if renew:
        old = Certificate.load(folder / _CERT)
        name, hosts = name or old.name, hosts or old.hosts
    if path.exists():
        mend = f"Have {_REQUEST} signed and install that, or remove {path.name}." if renew else "Renew it with --renew."
        raise IdentityError("there is a key already", where=str(path), mend=mend)
    if name is None:
        raise IdentityError("the node needs a name", mend="Give --name.")
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, require_name(name))])
    )
    if hosts:
        # So that all can be tried on one machine.
        hosts = tuple(dict.fromkeys([*hosts, *LOOPBACK]))
        builder = builder.add_extension(alternative_names(hosts), critical=False)
    key = keys.new_key()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    csr = builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    files.write(folder / _REQUEST, csr)
    keys.save_key(path, key, passphrase)  # last: without it the call can be repeated
    return folder / _REQUEST


def install(
    bundle: Path,
    folder: Path,
    *,
    passphrase: bytes | None = None,
    fingerprint: str | None = None,
    now: datetime | None = None,
) -> Identity:
    """Take in what ``molehill pki sign`` wrote; safe to repeat.

    Args:
        bundle: The certificate with the authority's behind it.
        folder: The identity's folder, with the key that was certified.
        passphrase: Of the key.
        fingerprint: What the authority's certificate must have (SHA-256, hexadecimal), or nothing is installed.
        now: When; this moment when omitted.

    Raises:
        IdentityError: It is for another key, of another authority, or does not hold.
    """
    certificate, authority = parse_all(keys.read(bundle), str(bundle), 2)
    if fingerprint is not None and fingerprint.lower().replace(":", "") != authority.fingerprint:
        raise IdentityError(
            f"the authority's fingerprint is {authority.fingerprint}, not {fingerprint}",
            where=str(bundle),
            mend="Do not use this file: somebody else made it, or the fingerprint was misread.",
        )
    certificate.require_issuer(authority)
    authority.require_time(now)
    certificate.require_time(now)
    if (folder / _CA).exists() and Certificate.load(folder / _CA).x509 != authority.x509:
        raise IdentityError(
            f"it comes from another authority than {folder / _CA}",
            where=str(bundle),
            mend=f"If the federation has a new authority, remove {folder / _CA} first.",
        )
    found = [folder / each for each in (_KEY, _NEW_KEY) if (folder / each).exists()]
    fitting = [path for path in found if keys.load_key(path, passphrase).public_key() == certificate.public_key]
    if not fitting:
        what = f"it is for a key that is not in {folder}" if found else f"there is no key in {folder}"
        raise IdentityError(what, where=str(bundle), mend="Install it where its request was made.")
    files.write(folder / _CA, authority.pem)
    if fitting[0].name == _NEW_KEY:
        fitting[0].replace(folder / _KEY)
    files.write(folder / _CERT, certificate.pem)
    usage: Usage = "server" if "server" in certificate.usages else "client"
    return Identity.load(folder, usage=usage, passphrase=passphrase, now=now)
