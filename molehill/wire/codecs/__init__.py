"""Codecs: how the values of a tree become bytes. One codec a file; numpy and zstandard only."""

from __future__ import annotations

from abc import ABC, abstractmethod

from molehill.wire.keys import Key
from molehill.wire.tree import Array, Layout, Tree


class Codec(ABC):
    """Turns the values of a tree into bytes; the names and shapes travel beside them.

    Attributes:
        exact: What is decoded is what was encoded, bit for bit (secure aggregation asks for it).
        feedback: `encode` uses its ``memory``; callers of other codecs need not keep one.
    """

    exact: bool = False
    feedback: bool = False

    @abstractmethod
    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode the values of ``tree`` in at most 4 bytes a number; a longer message is refused before it is read.

        Args:
            tree: What to send.
            memory: What earlier calls left unsent, by key. A codec with ``feedback`` adds it to the tree and stores
                what this call leaves unsent; every other codec ignores it.

        Raises:
            MessageError: A value is NaN or infinite, or too large for the codec.
        """

    @abstractmethod
    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode what `encode` wrote for a tree of this layout.

        Memory stays in proportion to ``layout.size``, whatever the payload says.

        Raises:
            MessageError: The payload is damaged or belongs to another layout.
        """


INTERFACE = Codec
WORDS = ("compression", "compressor", "quantisation", "quantization")
