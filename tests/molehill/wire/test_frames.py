from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from molehill.wire.frames import pack, unpack
from molehill_protos.v1.exchange_pb2 import Chunk, PutChunk, PutHeader


@pytest.mark.parametrize("kind", [Chunk, PutChunk])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 2**14 - 1, 2**14, 2**20])
def test_data_are_as_protobuf_writes_and_reads_them(kind: type, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    raw = pack(memoryview(data)[:size])
    assert raw == kind(data=data[:size]).SerializeToString()
    assert unpack(kind)(raw) == data[:size]


def test_all_else_is_left_to_protobuf() -> None:
    header = PutChunk(header=PutHeader(run="run", round=3))
    assert unpack(PutChunk)(pack(header)) == header
    assert unpack(Chunk)(pack(Chunk(length=0))) == Chunk(length=0)
    assert unpack(Chunk)(b"") == Chunk()
    assert unpack(Chunk)(b"\x12\x81\x00x") == b"x"  # a length in more bytes than it needs
    assert unpack(Chunk)(b"\x12\x01x\x12\x01y") == b"y"  # twice the same field: the last one counts


@pytest.mark.parametrize("raw", [b"\x12", b"\x12\x05", b"\x12\x05abc", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"])
def test_what_is_cut_is_no_message(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        unpack(Chunk)(raw)
