"""Plain 32-bit floats."""

from __future__ import annotations

import numpy as np

from molehill.registry import register
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import require_length
from molehill.wire.tree import Array, Layout, Tree


@register("codec", "fp32", paper="house")
class Fp32(Codec):
    """Little-endian float32, exact: 32 bits per number."""

    exact = True

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`."""
        return tree.require_finite().flat.astype("<f4", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        require_length(len(payload), 4 * layout.size)
        return Tree(layout, np.frombuffer(payload, "<f4").astype(np.float32)).require_finite()
