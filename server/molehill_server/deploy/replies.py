"""What a node may tell Flower: its own replies, and nothing that another node would take for the server's orders.

Flower knows from the signature which node calls, but takes the source of a message from its body. One that answers no
other message is stored as an instruction for whomever it names.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

_PUSH = "/v1/fleet/push-messages"


def refuse(path: str, body: bytes) -> tuple[int, str] | None:
    """Say why a call of a node is not forwarded (`molehill.gateway.Refuse`).

    Args:
        path: Of the call.
        body: Of the call.

    Returns:
        HTTP status and reason; None when the call may pass.
    """
    if path != _PUSH:
        return None
    try:
        asked = PushMessagesRequest.FromString(body)
    except DecodeError:
        return 400, "the body is none of the call"
    if len(asked.messages_list) != 1:  # Flower reads the first and no other
        return 400, f"{len(asked.messages_list)} messages in place of one"
    said = asked.messages_list[0].metadata
    if said.src_node_id != asked.node.node_id:
        return 403, "a message in the name of another node"
    if not said.reply_to_message_id:
        return 403, "a message that is no reply"
    return None
