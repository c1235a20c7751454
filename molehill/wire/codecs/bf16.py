"""bfloat16: the upper half of a float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molehill.errors import MessageError
from molehill.registry import register
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import pack, planes, unpack, unplanes
from molehill.wire.tree import Array, Layout, Tree


@dataclass(frozen=True)
class Bf16Params:
    """Parameters of `Bf16`.

    Attributes:
        zstd: Compress; low and high bytes are kept apart.
    """

    zstd: bool = False


@register("codec", "bf16", paper="house", params=Bf16Params)
class Bf16(Codec):
    """bfloat16, rounded to nearest even: 16 bits per number, relative error at most 2^-8, the range of float32."""

    def __init__(self, params: Bf16Params) -> None:
        self.params = params

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`."""
        bits = tree.require_finite().flat.view(np.uint32)
        # Adding just under half of the dropped part, plus the lowest kept bit, carries exactly when rounding is up.
        upper = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype("<u2")
        infinite = (upper & 0x7F80) == 0x7F80
        if infinite.any():
            index = int(infinite.argmax())
            key = next(key for key in tree if tree.layout.span(key).stop > index)
            raise MessageError("a value is above the range of bfloat16", where=key.name, mend="Use another codec.")
        return pack(planes(upper), zstd=self.params.zstd)

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        upper = unplanes(unpack(payload, 2 * layout.size, zstd=self.params.zstd), "<u2")
        return Tree(layout, (upper.astype(np.uint32) << 16).view(np.float32)).require_finite()
