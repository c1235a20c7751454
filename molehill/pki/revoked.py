"""Which certificates an authority has taken back, as a server looks it up."""

from __future__ import annotations

from pathlib import Path

from molehill import files
from molehill.errors import IdentityError
from molehill.pki import keys
from molehill.pki.certificate import Certificate


class Revoked:
    """The serial numbers in a ``revoked.json``, read again when the file changes: a server need not be restarted.

    Args:
        path: The file.

    Raises:
        IdentityError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._serials: frozenset[str] = frozenset()
        self._refresh()

    def __contains__(self, certificate: Certificate) -> bool:
        """Whether a certificate is revoked; raises as the constructor does, so that nobody slips through."""
        self._refresh()
        return certificate.serial in self._serials

    def _refresh(self) -> None:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise IdentityError(f"cannot read it: {error.strerror}", where=str(self._path)) from None
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            try:
                found = files.parse_json(keys.read(self._path))
                self._serials = frozenset(f"{int(serial, 16):x}" for serial in found)
            except (ValueError, TypeError):
                raise IdentityError("not a list of serial numbers", where=str(self._path)) from None
            self._seen = seen
