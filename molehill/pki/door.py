"""Who is let in: the owners of living certificates."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from molehill.errors import ConfigError, IdentityError
from molehill.pki.certificate import Certificate, require_name
from molehill.pki.revoked import Revoked

_log = logging.getLogger(__name__)


class Door:
    """Lets the owners of certificates in that TLS has found to be signed by the authority.

    Time and revocation are looked at again for every call: connections live long.

    Args:
        revoked: The authority's ``revoked.json``. Nobody is revoked before there is one; once seen it must stay.
    """

    def __init__(self, revoked: Path) -> None:
        self._path = revoked
        self._revoked: Revoked | None = None

    def admit(self, certificate: Certificate) -> str:
        """The name of the one who is let in.

        Args:
            certificate: The one shown.

        Raises:
            IdentityError: It is revoked, not valid now, or its common name cannot be a node's.
            ConfigError: The list of revoked certificates is gone or damaged, so nobody is let in.
        """
        if self.revoked(certificate):
            raise IdentityError("this certificate was revoked")
        now = datetime.now(certificate.begins.tzinfo)
        if not certificate.begins <= now <= certificate.ends:
            raise IdentityError("this certificate is not valid now")
        try:
            return require_name(certificate.name)
        except IdentityError as error:
            raise IdentityError(f"the common name of this certificate: {error}") from None

    def revoked(self, certificate: Certificate) -> bool:
        """Whether a certificate is revoked.

        Raises:
            ConfigError: The list of revoked certificates is gone or damaged.
        """
        if self._revoked is None and not self._path.exists():
            return False
        try:
            listed = self._revoked = Revoked(self._path) if self._revoked is None else self._revoked
            held = certificate in listed
        except IdentityError as error:
            _log.error("nobody is let in: %s", error)
            mend = "Copy the authority's list again."
            raise ConfigError(
                "the list of revoked certificates is gone or damaged", where=str(self._path), mend=mend
            ) from None
        return held
