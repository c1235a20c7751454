"""The experts that a device adds to the bundles of its store, and whether somebody trusted must have signed them.

::

    experts/<bundle>/<expert>/added.json         which file, by its SHA-256, and where it is from
    experts/<bundle>/<expert>/<n>.targets.json   the signed list that named it; none for a file that nobody has signed
    settings.json                                whether experts must be signed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from molehill import files
from molehill.errors import BundleError, TrustError
from molehill_edge import manifest as manifests
from molehill_edge import offers, signatures
from molehill_edge.signatures import Known

_DIGEST, _NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
_RECORD, _SETTINGS = "added.json", "settings.json"
_SAID = {b'{"experts": "signed"}\n': True, b'{"experts": "any"}\n': False}  # whatever else is there is damage


@dataclass(frozen=True)
class Added:
    """An expert that this device adds to a bundle.

    Args:
        id: Of the expert.
        bundle: Id of the bundle.
        sha256: Of its file, in hexadecimal digits.
        version: As it was signed; 0 for a file that nobody has signed.
        repository: Where it is from, by the digest of the pinned root; empty for a file.
        root: Version of the root metadata whose keys have signed the list.
        listed: Version of the signed list.
    """

    id: str
    bundle: str
    sha256: str
    version: int = 0
    repository: str = ""
    root: int = 0
    listed: int = 0

    @property
    def signed(self) -> bool:
        """Whether it came from a repository."""
        return bool(self.repository)


class Shelf:
    """The experts that are added to the bundles of a store.

    Args:
        folder: Of the store.
        blob: Where a file with this SHA-256 lies.
        known: A repository by the digest of its pinned root.
    """

    def __init__(self, folder: Path, blob: Callable[[str], Path], known: Callable[[str], Known]) -> None:
        self._folder = folder
        self._home = folder / "experts"
        self._blob = blob
        self._known = known

    @property
    def signed_only(self) -> bool:
        """Whether this device takes experts only when they came as signed targets of a repository.

        Raises:
            BundleError: The settings cannot be read.
        """
        path = self._folder / _SETTINGS
        try:
            return _SAID[path.read_bytes()]
        except FileNotFoundError:
            return False
        except (OSError, KeyError):
            mend = "Set it anew: molehill edge policy --experts signed"
            raise BundleError("cannot read the settings of the store", where=str(path), mend=mend) from None

    def require_signed(self, *, required: bool) -> None:
        """Set `signed_only`; while the store is locked."""
        files.write(self._folder / _SETTINGS, next(data for data, said in _SAID.items() if said == required))

    def of(self, bundle: str) -> list[Added]:
        """What is added to a bundle, by id, as it is written down; signatures are not checked.

        Raises:
            BundleError: The store is damaged.
        """
        return self._records(f"{bundle}/*/{_RECORD}") if manifests.valid_id(bundle) else []

    def all(self) -> list[Added]:
        """What is added to any bundle.

        Raises:
            BundleError: The store is damaged.
        """
        return self._records(f"*/*/{_RECORD}")

    def _records(self, pattern: str) -> list[Added]:
        found = [self._record(path) for path in sorted(self._home.glob(pattern))]
        return [made for made in found if made is not None]

    def _record(self, path: Path) -> Added | None:
        bundle, expert = path.parent.parent.name, path.parent.name
        try:
            made = Added(**files.parse_json(path.read_bytes()))
        except FileNotFoundError:
            return None  # removed a moment ago
        except (OSError, ValueError, TypeError):
            made = None
        if made is None or (made.bundle, made.id) != (bundle, expert) or not _is_plausible(made):
            mend = f"Remove it, then add it again: molehill edge remove {bundle} {expert}"
            raise BundleError("the record of an added expert is damaged", where=str(path), mend=mend)
        return made

    def checked(self, bundle: str) -> tuple[tuple[Added, bytes], ...]:
        """What is added to a bundle, with the files, of which SHA-256 and, where there are some, signatures are right.

        Raises:
            BundleError: A file is damaged.
            TrustError: The signatures of one do not hold, or it has none and this device asks for them.
        """
        while True:
            records = self.of(bundle)
            try:
                return tuple(self._checked(records))
            except (BundleError, TrustError):
                if self.of(bundle) == records:
                    raise  # or else an update has just exchanged them

    def _checked(self, records: Sequence[Added]) -> Iterator[tuple[Added, bytes]]:
        strict = self.signed_only
        for added in records:
            if strict and not added.signed:
                name, bundle = added.id, added.bundle
                what = f"expert {name} of bundle {bundle} is not signed, and this device takes signed experts only"
                raise TrustError(what, where=str(self._folder), mend=f"Run: molehill edge remove {bundle} {name}")
            yield added, self._verified(added)

    def _verified(self, added: Added) -> bytes:
        path = self._blob(added.sha256)
        mend = f"Run: molehill edge update, or: molehill edge remove {added.bundle} {added.id}"
        try:
            data = path.read_bytes()
        except OSError as error:
            what = f"cannot read expert {added.id}: {error.strerror}"
            raise BundleError(what, where=str(path), mend=mend) from None
        if hashlib.sha256(data).hexdigest() != added.sha256:
            raise BundleError(f"expert {added.id} is damaged: its SHA-256 differs", where=str(path), mend=mend)
        if added.signed:
            listed = self._folder_of(added.bundle, added.id) / f"{added.listed}.targets.json"
            name = offers.expert_target(added.bundle, added.id)
            what = f"expert {added.id} of bundle {added.bundle}"
            entry = signatures.check(
                self._known(added.repository), added.root, listed, name, data, what=what, mend=mend
            )
            offer = offers.read(entry)
            if offer is None or offer.version != added.version:
                raise TrustError(f"{what} is of another version than the signed one", where=str(listed), mend=mend)
        return data

    def keep(self, added: Added, listed: bytes | None) -> None:
        """Have an expert whose file is a blob in a bundle from now on; while the store is locked.

        Args:
            added: The expert.
            listed: The signed list that names it; None for a file that nobody has signed.
        """
        folder = self._folder_of(added.bundle, added.id)
        folder.mkdir(parents=True, exist_ok=True)
        proof = folder / f"{added.listed}.targets.json"
        if listed is not None:
            files.write(proof, listed)
        files.write(folder / _RECORD, json.dumps(asdict(added), indent=2).encode() + b"\n")
        for path in folder.glob("*.targets.json"):
            if path != proof:
                path.unlink()

    def forget(self, bundle: str, expert: str) -> bool:
        """Add an expert no more; while the store is locked. Returns whether it was added."""
        folder = self._folder_of(bundle, expert)
        if not manifests.valid_id(bundle) or not manifests.valid_id(expert) or not folder.is_dir():
            return False
        (folder / _RECORD).unlink(missing_ok=True)  # first: the rest means nothing without it
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        return True

    def _folder_of(self, bundle: str, expert: str) -> Path:
        return self._home / bundle / expert


def _is_plausible(made: Added) -> bool:
    """Whether a record has the types of its fields, and no path in them."""
    texts = (made.id, made.bundle, made.sha256, made.repository)
    numbers = (made.version, made.root, made.listed)
    if not all(isinstance(text, str) for text in texts) or any(type(number) is not int for number in numbers):
        return False
    digests = _DIGEST.fullmatch(made.sha256) and (not made.repository or _NAME.fullmatch(made.repository))
    return bool(digests) and manifests.valid_id(made.id) and manifests.valid_id(made.bundle)
