"""Signatures by which one machine of a federation believes another, whoever passes the bytes on."""

from __future__ import annotations

import base64
import json

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from molehill.errors import IdentityError
from molehill.pki.certificate import Certificate
from molehill.pki.identity import Identity


class Signer:
    """Signs with the key of this machine (ECDSA, P-384, SHA-384), and checks what others of its federation signed.

    A revoked certificate is refused by the server only: whoever has one may sign until it expires. A server's may not:
    what is signed here protects machines from their server.

    Args:
        identity: This machine's.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def sign(self, data: bytes) -> str:
        """A signature with this machine's certificate, as JSON."""
        signature = base64.b64encode(self._identity.sign(data)).decode()
        return json.dumps({"certificate": self._identity.certificate.pem.decode(), "signature": signature})

    def verify(self, name: str, data: bytes, proof: str) -> None:
        """Refuse what the machine of this name did not sign.

        Args:
            name: Name in its certificate.
            data: What it is to have signed.
            proof: What `sign` gave there.

        Raises:
            IdentityError: There is no signature, it is wrong, or its certificate is another machine's, a server's, does
                not hold now, or comes from another authority.
        """
        where = f"signature of {name}"
        try:
            found = json.loads(proof)
            pem, signature = found["certificate"].encode(), base64.b64decode(found["signature"], validate=True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise IdentityError("there is no signature, or it is damaged", where=where) from None
        certificate = Certificate.parse(pem, where)
        certificate.require_issuer(self._identity.authority)
        certificate.require_time()
        if certificate.name != name or "client" not in certificate.usages:
            raise IdentityError(f"it was made with the certificate of {certificate.name!r}", where=where)
        if "server" in certificate.usages:
            raise IdentityError(
                "it was made with the certificate of a server, which is no owner's machine",
                where=where,
                mend="Give the machine an identity that is not signed with --server.",
            )
        try:
            certificate.public_key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise IdentityError("it is not for these bytes", where=where, mend="Somebody changed them.") from None
