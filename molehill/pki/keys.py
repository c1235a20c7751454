"""Private keys in files: elliptic curve P-384, which TLS and Flower's node authentication both take."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from molehill import files
from molehill.errors import IdentityError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> PrivateKey:
    """Make a key."""
    return ec.generate_private_key(ec.SECP384R1())


def require_p384(key: object, where: str) -> PublicKey:
    """The key itself, when it is of the one kind that is used here.

    Raises:
        IdentityError: It is of another kind.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError("the key is not on the curve P-384", where=where, mend="Make it with: molehill pki request")
    return key


def save_key(path: Path, key: PrivateKey, passphrase: bytes | None) -> None:
    """Write a key for its owner's eyes only, encrypted when there is a passphrase.

    Raises:
        IdentityError: There is a file already: a key is never overwritten.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    try:
        files.write(path, data, mode=files.PRIVATE, replace=False)
    except FileExistsError:
        raise IdentityError("there is a key already", where=str(path)) from None


def load_key(path: Path, passphrase: bytes | None) -> PrivateKey:
    """Read a key.

    Raises:
        IdentityError: It is missing, open to others, damaged, of another kind, or the passphrase is not its own.
    """
    data = read(path, private=True)
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except TypeError:  # the library's word for a passphrase that is missing, or one too many
        what, mend = "the key is encrypted", "Give its passphrase in a file: --passphrase-file FILE."
        if passphrase is not None:
            what, mend = "the key has no passphrase, and one was given", "Leave the passphrase out."
        raise IdentityError(what, where=str(path), mend=mend) from None
    except (ValueError, UnsupportedAlgorithm):
        what = "not a private key in PEM form" if passphrase is None else "the passphrase is wrong, or the key damaged"
        raise IdentityError(what, where=str(path)) from None
    require_p384(key.public_key(), str(path))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def pem(key: PrivateKey) -> bytes:
    """A key in PEM form, in the clear: for a TLS library, not for a disk."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def openssh(key: PublicKey) -> str:
    """A public key as one line of OpenSSH, as ``flwr supernode register`` takes it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_passphrase(path: Path | None) -> bytes | None:
    """The first line of a file; None when there is no file.

    Raises:
        IdentityError: The file cannot be read, is open to others, or begins with an empty line.
    """
    if path is None:
        return None
    line = read(path, private=path.is_file()).partition(b"\n")[0].rstrip(b"\r")  # a pipe has no owner to protect it
    if not line:
        raise IdentityError("there is no passphrase in the first line", where=str(path))
    return line


def require_lasting(path: Path | None) -> None:
    """Refuse a passphrase that can be read only once: processes of a deployment that are started later need it again.

    Raises:
        IdentityError: It comes through a pipe.
    """
    if path is not None and path.exists() and not path.is_file():
        raise IdentityError(
            "the passphrase must be in a file, since it is read again",
            where=str(path),
            mend="Write it to a file of mode 0600 in memory, for example below /dev/shm.",
        )


def read(path: Path, *, private: bool = False) -> bytes:
    """Read a file.

    Args:
        path: The file.
        private: Whether it must be readable by its owner only.

    Raises:
        IdentityError: It cannot be read, or others can.
    """
    try:
        if private and not files.is_private(path):
            raise IdentityError("other users can read this secret", where=str(path), mend=f"Run: chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"cannot read it: {error.strerror}", where=str(path)) from None
