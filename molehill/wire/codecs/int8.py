"""8-bit integers with one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

from molehill.registry import register
from molehill.wire import integers
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import Segments
from molehill.wire.tree import Array, Layout, Tree


@dataclass(frozen=True)
class Int8Params:
    """Parameters of `Int8`.

    Attributes:
        zstd: Compress.
    """

    zstd: bool = False


@register(
    "codec",
    "int8",
    paper="Dettmers et al. 2022, LLM.int8() (vector-wise absmax)",
    url="https://arxiv.org/abs/2208.07339",
    params=Int8Params,
)
class Int8(Codec):
    """Symmetric 8-bit integers, one float16 scale per row (short ones joined): ``x ~ q s``, ``s = max|row| / 127``."""

    def __init__(self, params: Int8Params) -> None:
        self.params = params

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`."""
        return integers.encode(tree.require_finite().flat, Segments.rows(tree.layout), 8, zstd=self.params.zstd)

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        return Tree(layout, integers.decode(payload, Segments.rows(layout), 8, zstd=self.params.zstd)).require_finite()
