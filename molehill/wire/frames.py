"""Messages of the data plane as bytes. Data, nearly all of them, are copied once instead of three times.

What is written and read is what protobuf would write and read: ``protos/molehill/v1/exchange.proto`` holds.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

_DATA = b"\x12"  # the tag of field 2 with a length: data, in Chunk and in PutChunk


def pack(part: Message | memoryview) -> bytes:
    """A message as bytes; a view is the data of a Chunk or a PutChunk."""
    if isinstance(part, Message):
        return part.SerializeToString()
    return b"".join((_DATA, _varint(part.nbytes), part))


def unpack(kind: type[Message]) -> Callable[[bytes], Message | memoryview]:
    """What reads messages of a kind (Chunk or PutChunk); their data come as a view, all else as the message."""

    def read(raw: bytes) -> Message | memoryview:
        if raw.startswith(_DATA):
            at, size = 1, 0
            for at, byte in enumerate(raw[1:6], 1):
                size |= (byte & 127) << 7 * (at - 1)
                if byte < 128:
                    break
            if at + 1 + size == len(raw):
                return memoryview(raw)[at + 1 :]
        message = kind.FromString(raw)
        return memoryview(message.data) if message.WhichOneof("part") == "data" else message  # type: ignore[attr-defined]  # both kinds have it

    return read


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes((*encoded, number))
