"""Who asks, and what they may do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc

from molehill.errors import ConfigError, IdentityError, MessageError
from molehill.pki import Certificate, Door
from molehill_server.exchange.grants import Grant, Grants
from molehill_server.exchange.refusal import Refusal

log = logging.getLogger("molehill.exchange")


class Rights:
    """What certificates and grants allow.

    Args:
        grants: Folder of the grants.
        revoked: The authority's list of revoked certificates.
    """

    def __init__(self, grants: Path, revoked: Path) -> None:
        self.grants = Grants(grants)
        self._door = Door(revoked)

    def identify(self, context: Any) -> str:
        """The name of the node, from its certificate.

        TLS has checked the certificate when the connection was made; it may have expired or been revoked since.

        Raises:
            Refusal: It has.
        """
        certificate = Certificate.parse(context.auth_context()["x509_pem_cert"][0])
        try:
            return self._door.admit(certificate)
        except IdentityError as error:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        except ConfigError:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the server's list of revoked certificates is damaged") from None

    def _granted(self, name: str) -> Grant:
        try:
            grant = self.grants.of(name)
        except (MessageError, IdentityError) as error:
            log.error("%s", error)  # noqa: TRY400 - its words say it all
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"the server's grant for {name} is damaged") from None
        if grant is None:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"there is no plan for {name}")
        return grant

    def may_read(self, name: str, digest: str) -> None:
        """Refuse a blob that the node's plan does not name.

        Raises:
            Refusal: It does not.
        """
        if digest not in self._granted(name).read:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"the plan of {name} does not name blob {digest[:12]}")

    def may_write(self, name: str, run: str, number: int) -> Grant:
        """The grant under which the node may deliver its delta of a round.

        Raises:
            Refusal: It may not.
        """
        grant = self._granted(name)
        if not grant.write or (grant.run, grant.round) != (run, number):
            may = f"for round {grant.round} of {grant.run}" if grant.write else "nothing"
            text = f"{name} may deliver {may}, not for round {number} of {run[:64]}"
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, text)
        return grant
