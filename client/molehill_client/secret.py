"""Bytes on this machine's disk that only this machine can read: AES-256-GCM, bound to what they are part of.

A sealed file is ``MHSEAL``, a version (1 byte), the length of the label (4 bytes, big-endian), the label (JSON: what
the bytes are, and which key it takes), a nonce (12 bytes), and the ciphertext with its tag. The label can be read by
everybody, and changed by nobody: all that stands before the nonce is authenticated with the ciphertext.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from molehill import files
from molehill.errors import ConfigError, ResumeError

VERSION = 1
_MAGIC = b"MHSEAL"
_HEAD = struct.Struct(">6sBI")
_NONCE = 12  # bytes; drawn at random, so one key may seal 2^32 files
_KEY = 32
_LARGEST = 2**31 - 1 - 16  # what one call of the library takes


class KeySource(Protocol):
    """Where the key of a machine's personal state is."""

    def load(self) -> bytes | None:
        """The key, 32 bytes; None when none was made yet.

        Raises:
            ResumeError: It is damaged, or others can read it.
        """
        ...

    def create(self) -> bytes:
        """Make the key, or take the one that somebody else has just made."""
        ...


class KeyFile:
    """A key in a file that its owner alone can read.

    Args:
        path: The file; made on first use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> bytes | None:
        """See `KeySource.load`."""
        try:
            if not files.is_private(self.path):
                raise ResumeError(
                    "other users can read the key of the personal state",
                    where=str(self.path),
                    mend=f"Run: chmod 600 {self.path}",
                )
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResumeError(f"cannot read the key: {error.strerror}", where=str(self.path)) from None
        return _parse_key(text, str(self.path))

    def create(self) -> bytes:
        """See `KeySource.create`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # by another process of the same run
            files.write(self.path, _new_key() + b"\n", mode=files.PRIVATE, replace=False)
        key = self.load()
        assert key is not None
        return key

    def __str__(self) -> str:
        return str(self.path)


class Keyring:
    """A key in the keyring of the operating system, which needs the package ``keyring``.

    Args:
        name: Under which name; one per machine and run, for example the path of the state.

    Raises:
        ConfigError: The package is not installed.
    """

    _SERVICE = "molehill personal state"

    def __init__(self, name: str) -> None:
        try:
            import keyring  # noqa: PLC0415  (an extra)
        except ImportError:
            raise ConfigError(
                "cannot import keyring", mend="Run: pip install 'molehill[keyring]', or keep the key in a file."
            ) from None
        self._ring = keyring
        self._name = name

    def load(self) -> bytes | None:
        """See `KeySource.load`."""
        try:
            text = self._ring.get_password(self._SERVICE, self._name)
        except self._ring.errors.KeyringError as error:
            raise ResumeError(f"the keyring cannot be read ({error})", where=str(self), mend="Unlock it.") from None
        return None if text is None else _parse_key(text.encode(), str(self))

    def create(self) -> bytes:
        """See `KeySource.create`."""
        text = _new_key()
        try:
            self._ring.set_password(self._SERVICE, self._name, text.decode())
        except self._ring.errors.KeyringError as error:
            raise ResumeError(f"the keyring cannot be written ({error})", where=str(self), mend="Unlock it.") from None
        return _parse_key(text, str(self))

    def __str__(self) -> str:
        return f"keyring entry {self._name}"


def seal(data: bytes, label: Mapping[str, str], key: bytes) -> bytes:
    """Encrypt bytes.

    Args:
        data: What nobody else may read.
        label: What it is; must be the same when it is opened.
        key: 32 bytes.

    Raises:
        ResumeError: There are more than 2 GiB of it.
    """
    if len(data) > _LARGEST:
        raise ResumeError(f"{len(data)} bytes of personal state in one file, at most {_LARGEST} can be kept")
    text = json.dumps({**label, "key": _key_id(key)}, sort_keys=True).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(text)) + text
    nonce = os.urandom(_NONCE)
    return head + nonce + AESGCM(key).encrypt(nonce, data, head)


def unseal(sealed: bytes, label: Mapping[str, str], key: bytes, where: str) -> bytes:
    """Undo `seal`.

    Args:
        sealed: What it returned.
        label: The same as there.
        key: The same as there.
        where: The file, for errors.

    Raises:
        ResumeError: It is damaged, from a newer version, of another run, client or place, or for another key.
    """
    try:
        magic, version, length = _HEAD.unpack_from(sealed)
        if magic != _MAGIC:
            raise damaged(where)
        if version > VERSION:
            raise ResumeError(
                f"the personal state has format {version}, this version of Molehill reads up to {VERSION}",
                where=where,
                mend="Use the version of Molehill that wrote it, or a newer one.",
            )
        start = _HEAD.size + length
        found = json.loads(sealed[_HEAD.size : start])
        differ = [name for name, wanted in label.items() if found[name] != wanted]
        maker = found["key"]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise damaged(where) from None
    if differ:
        name = differ[0]
        raise ResumeError(
            f"personal state belongs to another {name} ({found[name]!r}, not {label[name]!r})",
            where=where,
            mend="Use a new run folder, or remove this client's folder to start its personal state anew.",
        )
    if maker != _key_id(key):
        raise ResumeError(
            f"the personal state was encrypted with another key ({maker}, this one is {_key_id(key)})",
            where=where,
            mend="Bring the key back, or remove this client's folder to start its personal state anew.",
        )
    nonce, rest = sealed[start : start + _NONCE], sealed[start + _NONCE :]
    try:
        return AESGCM(key).decrypt(nonce, rest, sealed[:start])
    except (InvalidTag, ValueError):
        raise damaged(where) from None


def damaged(where: str) -> ResumeError:
    """What is said of a file whose bytes are not those that were written."""
    mend = "Bring it back, or remove it to go on from the round before; the run's report will say so."
    return ResumeError("the personal state is damaged", where=where, mend=mend)


def _new_key() -> bytes:
    return base64.b64encode(os.urandom(_KEY))


def _parse_key(text: bytes, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != _KEY:
        raise ResumeError("not a key of a personal state", where=where, mend="Bring the right file back.")
    return key


def _key_id(key: bytes) -> str:
    """Names a key without telling anything of it."""
    return hashlib.sha256(b"molehill key id" + key).hexdigest()[:16]
