"""What a node is told when it does not get what it asks for."""

from __future__ import annotations

import grpc

from molehill.errors import IdentityError, MessageError
from molehill.wire import exchange


class Refusal(Exception):  # noqa: N818 - not our error
    """What a node is told.

    Args:
        code: gRPC status.
        text: Why.
    """

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def require_digest(name: str) -> None:
    """Refuse what is no digest.

    Raises:
        Refusal: It is something else.
    """
    try:
        exchange.require_digest(name)
    except (MessageError, IdentityError) as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
