"""The keys behind a repository of bundles, and the root metadata that tells devices which of them count.

A folder: ``N.root.json`` (every version, public), ``root.json`` (the newest, what a device pins), ``offline/`` (root
and targets), ``online/`` (snapshot and timestamp) and ``retired/``. The offline half belongs on a machine, or a stick,
that is not on a network; whoever holds only the online half can show devices an old state, and never a bundle of their
own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from molehill import files
from molehill.errors import IdentityError, TrustError

ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
OFFLINE = (Root.type, Targets.type)
ROOT_KEYS = 2
YEAR = 365  # days
_CLEAR = b"-----BEGIN PRIVATE KEY-----"
_SHORT = 12  # digits of a key's id in the name of its file: enough to tell a few keys apart


class Keys:
    """A folder of keys.

    Args:
        folder: The folder.
        passphrase: Of the keys that are kept offline.
        online: Of those that are kept online; the same when None.
    """

    def __init__(self, folder: Path, passphrase: bytes | None = None, online: bytes | None = None) -> None:
        self.folder = folder
        self._passphrases = {role: passphrase if role in OFFLINE else online or passphrase for role in ROLES}
        self._loaded: dict[str, CryptoSigner] = {}

    @classmethod
    def create(
        cls,
        folder: Path,
        passphrase: bytes,
        online: bytes | None = None,
        *,
        plain: bool = False,
        threshold: int = ROOT_KEYS,
        days: int = YEAR,
        now: datetime | None = None,
    ) -> Keys:
        """Make two root keys and one of each other role, and the first root metadata.

        Args:
            folder: Where they go; must not exist, or be empty.
            passphrase: Encrypts the keys that are kept offline.
            online: Encrypts those that are kept online; the same when None.
            plain: Leave those in the clear, for a machine that signs every night without anybody there.
            threshold: How many of the two root keys must sign a new root.
            days: How long the root lasts.
            now: The clock's time when None.

        Raises:
            IdentityError: The folder holds something.
        """
        if folder.exists() and any(folder.iterdir()):
            raise IdentityError("the folder is not empty", where=str(folder), mend="Keys are never overwritten.")
        made = cls(folder, passphrase, online)
        for part in (folder, folder / "offline", folder / "online"):
            part.mkdir(parents=True, exist_ok=True)
            part.chmod(0o700)
        root = Root(expires=_from(now, days), consistent_snapshot=True)
        signers = []
        for role in ROLES:
            for _ in range(ROOT_KEYS if role == Root.type else 1):
                signer = made._new(role, plain=plain and role not in OFFLINE)
                root.add_key(signer.public_key, role)
                signers += [signer] if role == Root.type else []
        root.roles[Root.type].threshold = threshold
        made._write_root(root, signers)
        return made

    def roots(self) -> list[Metadata[Root]]:
        """All versions of the root metadata from the first on, each signed by the one before.

        Raises:
            IdentityError: There are none here.
            TrustError: They are damaged, or one is not signed as it must be.
        """
        found: list[Metadata[Root]] = []
        while (path := self.root_path(len(found) + 1)).is_file():
            found.append(read_root(path, found[-1].signed if found else None))
        if not found:
            mend = "Begin with: molehill keys init DIR"
            raise IdentityError("there are no keys of a repository here", where=str(self.folder), mend=mend)
        return found

    def root_path(self, version: int) -> Path:
        """Where a version of the root metadata lies."""
        return self.folder / f"{version}.root.json"

    def key_path(self, role: str, keyid: str) -> Path:
        """Where a private key lies."""
        return self.folder / ("offline" if role in OFFLINE else "online") / f"{role}-{keyid[:_SHORT]}.pem"

    def signers(self, role: str, root: Root) -> list[CryptoSigner]:
        """The keys of a role that lie here.

        Args:
            role: One of `ROLES`.
            root: Which keys it has.

        Raises:
            IdentityError: Fewer than must sign, or one cannot be read.
        """
        paths = [(keyid, self.key_path(role, keyid)) for keyid in root.roles[role].keyids]
        here = [(keyid, path) for keyid, path in paths if path.is_file()]
        if len(here) < root.roles[role].threshold:
            what = f"{len(here)} keys for {role} are here, and {root.roles[role].threshold} must sign"
            raise IdentityError(what, where=str(paths[0][1] if paths else self.folder))
        for keyid, path in here:
            if keyid not in self._loaded:  # decrypting is slow on purpose
                self._loaded[keyid] = self._load(role, keyid, path)
        return [self._loaded[keyid] for keyid, _ in here]

    def rotate(
        self, role: str, *, plain: bool = False, days: int = YEAR, now: datetime | None = None
    ) -> Metadata[Root]:
        """Replace the key of a role, the older one for root, and sign a new version of the root metadata.

        The new version is signed by the root keys of the version before and by its own: so a device that knows only
        the old ones accepts it. It counts from the next publication on; the old key moves to ``retired/``.

        Args:
            role: One of `ROLES`.
            plain: Leave the new key in the clear; only for those that are kept online.
            days: How long the new root lasts.
            now: The clock's time when None.

        Raises:
            IdentityError: There are too few root keys here, or one cannot be read.
        """
        old = self.roots()[-1].signed
        signers = self.signers(Root.type, old)  # before anything is written
        new = copy.deepcopy(old)
        retired = old.roles[role].keyids[:1] if role == Root.type else list(old.roles[role].keyids)
        for keyid in retired:
            new.revoke_key(keyid, role)
        signer = self._new(role, plain=plain and role not in OFFLINE)
        new.add_key(signer.public_key, role)
        signers += [signer] if role == Root.type else []
        made = self._sign_next(old, new, signers, days, now)
        (self.folder / "retired").mkdir(mode=0o700, exist_ok=True)
        for keyid in retired:
            path = self.key_path(role, keyid)
            if path.is_file():
                path.replace(self.folder / "retired" / path.name)
        return made

    def renew(self, *, days: int = YEAR, now: datetime | None = None) -> Metadata[Root]:
        """Sign a new version of the root metadata with the same keys, so that it lasts longer.

        Args:
            days: How long it lasts.
            now: The clock's time when None.

        Raises:
            IdentityError: There are too few root keys here, or one cannot be read.
        """
        old = self.roots()[-1].signed
        return self._sign_next(old, copy.deepcopy(old), self.signers(Root.type, old), days, now)

    def _sign_next(
        self, old: Root, new: Root, signers: Sequence[CryptoSigner], days: int, now: datetime | None
    ) -> Metadata[Root]:
        new.version, new.expires = old.version + 1, _from(now, days)
        return self._write_root(new, signers)

    def _write_root(self, root: Root, signers: Sequence[CryptoSigner]) -> Metadata[Root]:
        made = Metadata(root)
        for signer in signers:
            made.sign(signer, append=True)
        data = made.to_bytes()
        files.write(self.root_path(root.version), data, replace=False)
        files.write(self.folder / "root.json", data)
        return made

    def _new(self, role: str, *, plain: bool) -> CryptoSigner:
        """Make a key and write it for its owner's eyes only."""
        passphrase = self._passphrases[role]
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if not plain:
            if passphrase is None:
                mend = "Write a passphrase to a file, run chmod 600 on it, and give it: --passphrase-file FILE."
                raise IdentityError(f"the key for {role} needs a passphrase", where=str(self.folder), mend=mend)
            encryption = serialization.BestAvailableEncryption(passphrase)
        key = Ed25519PrivateKey.generate()
        signer = CryptoSigner(key)
        data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        files.write(self.key_path(role, signer.public_key.keyid), data, mode=files.PRIVATE, replace=False)
        return signer

    def _load(self, role: str, keyid: str, path: Path) -> CryptoSigner:
        try:
            if not files.is_private(path):
                raise IdentityError("other users can read this secret", where=str(path), mend=f"Run: chmod 600 {path}")
            data = path.read_bytes()
        except OSError as error:
            raise IdentityError(f"cannot read it: {error.strerror}", where=str(path)) from None
        passphrase = None if data.startswith(_CLEAR) else self._passphrases[role]
        try:
            key = serialization.load_pem_private_key(data, passphrase)
        except TypeError:  # the library's word for a passphrase that is missing
            mend = "Give its passphrase in a file: --passphrase-file FILE."
            raise IdentityError("the key is encrypted", where=str(path), mend=mend) from None
        except (ValueError, UnsupportedAlgorithm):
            raise IdentityError("the passphrase is wrong, or the key damaged", where=str(path)) from None
        if not isinstance(key, Ed25519PrivateKey) or SSlibKey.from_crypto(key.public_key()).keyid != keyid:
            raise IdentityError("the key is not the one of its name", where=str(path))
        return CryptoSigner(key)


def read_root(path: Path, before: Root | None) -> Metadata[Root]:
    """Read a version of the root metadata.

    Args:
        path: The file.
        before: The version before, which must have signed it; None for one that is trusted as it is.

    Raises:
        TrustError: It is damaged, or not signed as it must be.
    """
    try:
        made = Metadata[Root].from_bytes(path.read_bytes())
        if made.signed.type != Root.type:
            raise TrustError("this is not root metadata", where=str(path))
        for root in (before, made.signed):
            if root is not None:
                root.verify_delegate(Root.type, made.signed_bytes, made.signatures)
    except OSError as error:
        raise TrustError(f"cannot read it: {error.strerror}", where=str(path)) from None
    except RepositoryError as error:
        raise TrustError(f"the root metadata is damaged or not signed: {error}", where=str(path)) from None
    if before is not None and made.signed.version != before.version + 1:
        raise TrustError(f"this is version {made.signed.version} of the root metadata", where=str(path))
    return made


def _from(now: datetime | None, days: float) -> datetime:
    """The moment when something made now ends, in whole seconds as metadata write it."""
    return (now or datetime.now(UTC)).replace(microsecond=0) + timedelta(days=days)
