"""Trees: a set of named float32 tensors in one flat vector.

One flat vector makes a delta one subtraction, an aggregation one fused add and a swap one copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.errors import MessageError
from molehill.wire.keys import NO_EXPERT, Key

Array: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, ...]


class Layout(Mapping[Key, Shape]):
    """Sorted keys with their shapes; says where each tensor lies in the flat vector.

    Args:
        shapes: Shape of every key; the order of the mapping does not matter.
    """

    def __init__(self, shapes: Mapping[Key, Shape]) -> None:
        self._shapes = {key: tuple(int(n) for n in shapes[key]) for key in sorted(shapes)}
        self.offsets: dict[Key, int] = {}
        total = 0
        for key, shape in self._shapes.items():
            self.offsets[key] = total
            total += math.prod(shape)
        self.size = total  # numbers, not bytes

    def __getitem__(self, key: Key) -> Shape:
        return self._shapes[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._shapes == other._shapes)

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all names and shapes."""
        text = "\n".join(f"{key.name} {'x'.join(map(str, shape))}" for key, shape in self._shapes.items())
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def experts(self) -> frozenset[tuple[str, str]]:
        """The experts of any kind (site, expert) of which there is at least one tensor."""
        return frozenset((key.site, key.expert) for key in self._shapes if key.expert != NO_EXPERT)

    def span(self, key: Key) -> slice:
        """The part of the flat vector that holds ``key``."""
        start = self.offsets[key]
        return slice(start, start + math.prod(self._shapes[key]))

    def where(self, keep: Callable[[Key], bool]) -> Layout:
        """The layout of the keys for which ``keep`` is true."""
        return Layout({key: shape for key, shape in self._shapes.items() if keep(key)})


class Tree(Mapping[Key, Array]):
    """Named float32 tensors that are views of one flat vector.

    Args:
        layout: Names and shapes.
        flat: The vector, ``[layout.size]``; zeros when omitted. It is kept, not copied.

    Raises:
        MessageError: ``flat`` has another length or dtype than the layout asks for.
    """

    def __init__(self, layout: Layout, flat: Array | None = None) -> None:
        flat = np.zeros(layout.size, np.float32) if flat is None else flat
        if flat.shape != (layout.size,) or flat.dtype != np.float32:
            raise MessageError(f"flat vector is {flat.dtype}{list(flat.shape)}, layout needs float32[{layout.size}]")
        self.layout = layout
        self.flat = flat

    @classmethod
    def of(cls, arrays: Mapping[Key, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> Tree:
        """Copy named arrays into a new tree (cast to float32)."""
        tree = cls(Layout({key: array.shape for key, array in arrays.items()}))
        for key, view in tree.items():
            view[...] = arrays[key]
        return tree

    def __getitem__(self, key: Key) -> Array:
        return self.flat[self.layout.span(key)].reshape(self.layout[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def copy(self) -> Tree:
        """A tree with a vector of its own."""
        return Tree(self.layout, self.flat.copy())

    def select(self, keep: Layout | Callable[[Key], bool]) -> Tree:
        """A copy that holds only some of the keys.

        Raises:
            KeyError: A key of ``keep`` is not in this tree.
        """
        layout = keep if isinstance(keep, Layout) else self.layout.where(keep)
        if layout == self.layout:
            return self.copy()
        tree = Tree(layout)
        for key, view in tree.items():
            view[...] = self[key]
        return tree

    def require_finite(self) -> Tree:
        """Return this tree.

        Raises:
            MessageError: A value is NaN or infinite; the message names its tensor.
        """
        if not np.isfinite(self.flat).all():
            bad = next(key for key in self.layout if not np.isfinite(self[key]).all())
            raise MessageError(
                "not every value is finite", where=bad.name, mend="Training diverged, or the bytes are damaged."
            )
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of layout and values (little-endian float32)."""
        head = hashlib.sha256(self.layout.digest.encode())
        head.update(self.flat.astype("<f4", copy=False).tobytes())
        return head.hexdigest()
