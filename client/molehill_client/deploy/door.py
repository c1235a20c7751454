"""The coordinator's door, as a lab machine finds it: whether it is let in, and whether their clocks agree."""

from __future__ import annotations

import http.client
import ssl
from datetime import datetime
from email.utils import parsedate_to_datetime

from molehill import address
from molehill.errors import DeployError

_OPEN = 10.0  # seconds for a connection to come about
_SKEW = 120.0  # seconds that clocks may be apart


class Refused(DeployError):  # noqa: N818 - says what it means where it is caught
    """The coordinator was reached, and does not let us in."""


def knock(host: str, port: int, tls: ssl.SSLContext) -> str:
    """Find out, with a clear word, whether the coordinator lets us in.

    Args:
        host: The coordinator.
        port: Its door for nodes.
        tls: Ours.

    Returns:
        Its time, as HTTP writes it.

    Raises:
        Refused: It does not let us in.
        DeployError: It cannot be reached, or does not answer.
    """
    where = address.join(host, port)
    line = http.client.HTTPSConnection(host, port, timeout=_OPEN, context=tls)
    try:
        line.connect()
    except (OSError, UnicodeError) as error:
        raise DeployError(
            f"the coordinator cannot be reached: {_reason(error)}",
            where=where,
            mend="Check that it is up, host, port, firewall, and the certificates: molehill pki show DIR.",
        ) from None
    try:
        line.request("GET", "/")
        there: str = line.getresponse().headers["Date"]
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError):
            raise DeployError("the coordinator does not answer", where=where, mend="See its log.") from None
        raise Refused(
            "the coordinator refuses this machine",
            where=where,
            mend="Its certificate may be revoked, or of an authority that the coordinator does not know; "
            "the coordinator's log names the reason.",
        ) from None
    finally:
        line.close()
    return there


def _reason(error: OSError | UnicodeError) -> str:
    """What a failed connection means, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no answer"
    return getattr(error, "strerror", None) or str(error)


def require_clock(there: str, here: datetime) -> None:
    """Refuse a clock that is too far from the coordinator's.

    Args:
        there: Its time, as HTTP writes it.
        here: Ours.

    Raises:
        DeployError: They are more than two minutes apart.
    """
    ahead = (here - parsedate_to_datetime(there)).total_seconds()
    if abs(ahead) > _SKEW:
        way = "ahead of" if ahead > 0 else "behind"
        raise DeployError(
            f"this machine's clock is {abs(ahead):.0f} s {way} the coordinator's",
            mend="Set the one that is wrong; both should keep time by NTP.",
        )
