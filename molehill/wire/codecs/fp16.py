"""16-bit floats with one common exponent."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from molehill.registry import register
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import from_half, pack, planes, split_head, to_half, unpack, unplanes
from molehill.wire.tree import Array, Layout, Tree

_HEAD = struct.Struct("<h")  # common exponent


@dataclass(frozen=True)
class Fp16Params:
    """Parameters of `Fp16`.

    Attributes:
        zstd: Compress; low and high bytes are kept apart.
    """

    zstd: bool = False


@register("codec", "fp16", paper="house", params=Fp16Params)
class Fp16(Codec):
    """IEEE float16 of the tree times a power of two: 16 bits per number, relative error at most 2^-11.

    The power of two brings the largest value just under the end of the range, so a finite tree never overflows.
    """

    def __init__(self, params: Fp16Params) -> None:
        self.params = params

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`."""
        exponent, half = to_half(tree.require_finite().flat)
        return _HEAD.pack(exponent) + pack(planes(half), zstd=self.params.zstd)

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        (exponent,), rest = split_head(payload, _HEAD)
        data = unpack(rest, 2 * layout.size, zstd=self.params.zstd)
        return Tree(layout, from_half(unplanes(data, "<f2"), exponent)).require_finite()
