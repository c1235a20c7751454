"""Who belongs to a federation: an offline certificate authority, and one identity per machine.

An identity serves mutual TLS with the exchange and the authentication of Flower's nodes. Needs ``cryptography`` only.
"""

from molehill.pki.authority import YEAR, YEARS, Authority, Issued
from molehill.pki.certificate import Certificate, stamp
from molehill.pki.door import Door
from molehill.pki.identity import Identity, install, request
from molehill.pki.keys import read_passphrase, require_lasting
from molehill.pki.revoked import Revoked
from molehill.pki.signing import Signer

__all__ = [
    "YEAR",
    "YEARS",
    "Authority",
    "Certificate",
    "Door",
    "Identity",
    "Issued",
    "Revoked",
    "Signer",
    "install",
    "read_passphrase",
    "request",
    "require_lasting",
    "stamp",
]
