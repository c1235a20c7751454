"""The certificates that nodes were let in with, so that one that is revoked can be struck off wherever its owner is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from molehill import files
from molehill.errors import IdentityError
from molehill.pki import Certificate

_log = logging.getLogger(__name__)


class Members:
    """The certificate that each node was let in with last; they survive a restart.

    Args:
        folder: Where they lie; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)
        self._known: dict[str, Certificate] = {}
        for path in sorted(folder.glob("[!.]*.pem")):
            try:
                self._known[path.stem] = Certificate.load(path)
            except IdentityError as error:  # of a node that is let in again it is written again
                _log.warning("%s", error)

    def __iter__(self) -> Iterator[Certificate]:
        return iter(list(self._known.values()))

    def note(self, certificate: Certificate) -> None:
        """Write down that the owner of a certificate is let in."""
        before = self._known.get(certificate.name)
        if before is None or before.fingerprint != certificate.fingerprint:
            files.write(self._folder / f"{certificate.name}.pem", certificate.pem, mode=files.PRIVATE)
            self._known[certificate.name] = certificate

    def forget(self, certificate: Certificate) -> None:
        """Forget the owner of a certificate that was struck off."""
        (self._folder / f"{certificate.name}.pem").unlink(missing_ok=True)
        self._known.pop(certificate.name, None)
