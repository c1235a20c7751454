"""A member of a federation that speaks to Flower's node API by hand, and need not say the truth."""

from __future__ import annotations

import hashlib
import ssl
import time
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from flwr.app import ConfigRecord, RecordDict
from flwr.proto import fleet_pb2, message_pb2, node_pb2

from molehill.pki import Identity


class Member:
    """Calls through the door.

    Args:
        identity: Folder of the identity whose key signs.
        port: The door.
        tls: Folder of the identity that opens the connection; the same when omitted.
    """

    def __init__(self, identity: Path, port: int, tls: Path | None = None) -> None:
        own = Identity.load(identity)
        self.key = load_pem_private_key(own.key_pem(), None)
        self.public = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        context: ssl.SSLContext = Identity.load(tls or identity).tls()
        self.client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=60, trust_env=False)
        self.number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def headers(self) -> dict[str, str]:
        """What Flower's node signs."""
        stamp = datetime.now(UTC).isoformat()
        signature = self.key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        shown = {"flwr-public-key": self.public, "flwr-signature": signature}
        coded = {name: b64encode(value).decode() for name, value in shown.items()}
        return {**coded, "flwr-timestamp": stamp, "content-type": "application/protobuf"}

    def post(self, call: str, body: object, **headers: str) -> httpx.Response:
        """One call; a message is written out. Where the door closes the connection instead of an answer: status 444."""
        content = body if isinstance(body, bytes) else body.SerializeToString()
        try:
            return self.client.post(f"/v1/fleet/{call}", content=content, headers={**self.headers(), **headers})
        except httpx.TransportError:
            return httpx.Response(444)

    def activate(self) -> int:
        """Take part; returns the status."""
        got = self.post("activate-node", fleet_pb2.ActivateNodeRequest(public_key=self.public, heartbeat_interval=30))
        if got.status_code == 200:
            self.number = fleet_pb2.ActivateNodeResponse.FromString(got.content).node_id
        return got.status_code

    def push(self, objects: int = 3, **said: object) -> httpx.Response:
        """Push a reply with so many objects."""
        return self.post("push-messages", reply_of(self.number, objects, **said))

    def pull(self) -> message_pb2.Metadata | None:
        """What the node is asked next, without its content."""
        asked = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=self.number))
        found = fleet_pb2.PullMessagesResponse.FromString(self.post("pull-messages", asked).content)
        return found.messages_list[0].metadata if found.messages_list else None

    def push_object(self, content: bytes, session: str = "session", run: int = 3) -> httpx.Response:
        """Push one object."""
        node, name = node_pb2.Node(node_id=self.number), digest(content)
        fields = {"run_id": run, "session_id": session, "object_id": name, "object_content": content}
        return self.post("push-object", message_pb2.PushObjectRequest(node=node, **fields))


def digest(content: bytes) -> str:
    """What Flower calls an object."""
    return hashlib.sha256(content).hexdigest()


def name_of(number: int) -> str:
    """The digest of some object."""
    return digest(str(number).encode())


def reply_of(node: int, objects: int = 3, **changes: object) -> fleet_pb2.PushMessagesRequest:
    """What a node says when it pushes a reply, as Flower writes it; the first object is the message."""
    said = {
        "src_node_id": node,
        "dst_node_id": 1,
        "reply_to_message_id": "abc",
        "run_id": 3,
        "message_id": name_of(0),
    } | changes
    children = [message_pb2.ObjectTree(object_id=name_of(number)) for number in range(1, objects)]
    return fleet_pb2.PushMessagesRequest(
        node=node_pb2.Node(node_id=node),
        messages_list=[message_pb2.Message(metadata=message_pb2.Metadata(**said))],
        message_object_trees=[message_pb2.ObjectTree(object_id=name_of(0), children=children)],
    )


def written(node: int, texts: Sequence[str], **said: object) -> tuple[fleet_pb2.PushMessagesRequest, dict[str, bytes]]:
    """A reply with a record of each text, and its objects by their digests; the reply itself is the last."""
    records = {f"reply{number or ''}": ConfigRecord({"json": text}) for number, text in enumerate(texts)}
    content = RecordDict(records).deflate()
    pushed = reply_of(node, 1, **{"message_type": "train", "created_at": time.time(), "ttl": 60.0} | said)
    (message,), (tree,) = pushed.messages_list, pushed.message_object_trees
    message.content.SetInParent()
    body = message.SerializeToString()
    parts = [*(record.deflate() for record in records.values()), content]
    parts.append(f"Message {digest(content)} {len(body)}\0".encode() + body)
    found = {digest(part): part for part in parts}
    *inner, middle, message.metadata.message_id = found
    tree.CopyFrom(message_pb2.ObjectTree(object_id=message.metadata.message_id))
    tree.children.add(object_id=middle).children.extend(message_pb2.ObjectTree(object_id=name) for name in inner)
    return pushed, found
