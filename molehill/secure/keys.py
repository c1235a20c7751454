"""Keys two clients agree on, what is encrypted with them, signatures (X25519, HKDF-SHA256, AES-GCM, Ed25519)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from molehill.errors import MessageError

KEY = 32  # bytes
SIGNATURE = 64  # bytes
OVERHEAD = 12 + 16  # bytes of nonce and tag

_DOMAIN = "molehill secure aggregation 2"


@dataclass(frozen=True)
class Occasion:
    """What every key is made for and good for.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at the round.
    """

    run: str
    round: int
    attempt: int

    def label(self, *words: str) -> bytes:
        """A text that no other use of a key has."""
        return "\0".join((_DOMAIN, self.run, str(self.round), str(self.attempt), *words)).encode()


def new_key() -> bytes:
    """A private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(own: bytes, other: bytes, label: bytes) -> bytes:
    """A key of 32 bytes that only the owners of two private keys can know.

    Args:
        own: A private key.
        other: The public key of the other one.
        label: What the key is for.

    Raises:
        MessageError: The public key is none.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(own).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise MessageError("a public key is none: it leads to the same secret with everybody") from None
    return HKDF(hashes.SHA256(), KEY, None, label).derive(secret)


def seal(data: bytes, key: bytes, label: bytes) -> bytes:
    """Encrypt bytes, bound to what they are."""
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, data, label)


def unseal(sealed: bytes, key: bytes, label: bytes) -> bytes:
    """Undo `seal`.

    Raises:
        MessageError: It was changed, or was sealed for somebody or something else.
    """
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], label)
    except (InvalidTag, ValueError):
        raise MessageError("shares of a secret cannot be opened: they were changed, or are for another") from None


def new_signing_key() -> bytes:
    """A private key to sign with."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def signing_public(private: bytes) -> bytes:
    """The public key of a private one to sign with."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(data: bytes, private: bytes) -> bytes:
    """A signature, the same each time."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(data)


def verify(data: bytes, signature: bytes, public_key: bytes) -> None:
    """Refuse what the owner of a key did not sign.

    Raises:
        MessageError: The signature is wrong, or the key is none.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise MessageError("a signature is not for this list of clients, or not of its client") from None
