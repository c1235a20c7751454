"""4-bit integers with one scale per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from molehill.registry import register
from molehill.wire import integers
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import Segments
from molehill.wire.tree import Array, Layout, Tree


@dataclass(frozen=True)
class Int4Params:
    """Parameters of `Int4`.

    Attributes:
        group: Numbers that share a scale; a group never crosses a tensor.
        zstd: Compress (entropy coding: the outer codes are rare).
    """

    group: Annotated[int, Field(ge=8, le=65536)] = 64
    zstd: bool = True


@register(
    "codec",
    "int4",
    paper="Dettmers & Zettlemoyer 2023, The case for 4-bit precision (block-wise)",
    url="https://arxiv.org/abs/2212.09720",
    params=Int4Params,
)
class Int4(Codec):
    """Symmetric 4-bit integers, one float16 scale per group: ``x ~ q s``, ``s = max|group| / 7``."""

    def __init__(self, params: Int4Params) -> None:
        self.params = params

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`."""
        return integers.encode(tree.require_finite().flat, self._groups(tree.layout), 4, zstd=self.params.zstd)

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        return Tree(layout, integers.decode(payload, self._groups(layout), 4, zstd=self.params.zstd)).require_finite()

    def _groups(self, layout: Layout) -> Segments:
        return Segments.groups(layout, self.params.group)
