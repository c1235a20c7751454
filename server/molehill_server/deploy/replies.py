"""What a node may tell Flower: its own replies, and nothing that another node would take for the server's orders.

Flower knows from the signature which node calls, but takes the source of a message from its body. One that answers no
other message is stored as an instruction for whomever it names; and it stores as many objects as a message names.
"""

from __future__ import annotations

import os
import re
from typing import TypeVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from google.protobuf.message import DecodeError, Message

from molehill.gateway import RefusedError

_MAX_OBJECTS = 16  # of a message; replies of ours have three
_MAX_MESSAGE = 256 * 2**10  # bytes of a message without its objects
_ID = re.compile(r"[0-9a-f]{64}")

M = TypeVar("M", bound=Message)


def judge(path: str, body: bytes) -> None:
    """Refuse what a node may not say.

    Args:
        path: Of the call.
        body: Of the call.

    Raises:
        RefusedError: The call must not reach Flower.
    """
    if path == "/v1/fleet/push-messages":
        _judge_message(_parse(PushMessagesRequest, body), len(body))
    elif path == "/v1/fleet/push-object":
        asked = _parse(PushObjectRequest, body)
        if not _ID.fullmatch(asked.object_id):
            raise RefusedError(400, "an object without a digest")
        # Flower would store it first under a session that others may have begun.
        if not asked.session_id:
            raise RefusedError(400, "an object of no message")


def _judge_message(asked: PushMessagesRequest, size: int) -> None:
    if len(asked.messages_list) != 1:  # Flower reads the first and no other
        raise RefusedError(400, f"{len(asked.messages_list)} messages in place of one")
    said = asked.messages_list[0].metadata
    if said.src_node_id != asked.node.node_id:
        raise RefusedError(403, "a message in the name of another node")
    if not said.reply_to_message_id:
        raise RefusedError(403, "a message that is no reply")
    if size > _MAX_MESSAGE:
        raise RefusedError(413, f"a message of more than {_MAX_MESSAGE} bytes")
    if len(asked.message_object_trees) != 1 or len(asked.clientapp_runtime_list) > 1:
        raise RefusedError(400, f"{len(asked.message_object_trees)} trees of objects in place of one")
    (tree,) = asked.message_object_trees
    if tree.object_id != said.message_id:  # Flower takes the same message again and again, each time with a tree
        raise RefusedError(403, "objects of another message")
    _require_few(tree)


def _require_few(tree: ObjectTree) -> None:
    seen, left = 0, [tree]
    while left:
        each = left.pop()
        seen += 1
        left.extend(each.children[:_MAX_OBJECTS])
        if seen + len(left) > _MAX_OBJECTS or len(each.children) > _MAX_OBJECTS:
            raise RefusedError(413, f"a message of more than {_MAX_OBJECTS} objects")
        if not _ID.fullmatch(each.object_id):
            raise RefusedError(400, "an object without a digest")


def _parse(kind: type[M], body: bytes) -> M:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise RefusedError(400, "the body is none of the call") from None
