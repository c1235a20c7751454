"""Names and shapes as they travel: the table of a tree's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.parsing import FOREIGN, MAX_ROWS, read_table, write_table
from molehill.wire.tree import Layout, Shape
from molehill_protos.v1 import tree_pb2

_MAX_DIMS = 4
_MAX_DIM = 2**24
_MAX_NUMBERS = 2**31
_SPARE = 256  # tensors that nobody asked for, among which the first is named


@lru_cache(maxsize=32)  # all messages of a round have few layouts
def write_layout(layout: Layout) -> bytes:
    """Write a layout.

    Raises:
        MessageError: A name or shape is outside the limits of the format.
    """
    for key, shape in layout.items():
        Key.parse(key.name)
        _require_shape(key.name, shape)
    _require_size(layout.size, _MAX_NUMBERS * 4)
    tensors = [tree_pb2.Tensor(name=key.name, shape=shape) for key, shape in layout.items()]
    return write_table(tree_pb2.TensorTable(tensors=tensors))


def read_layout(data: bytes, max_bytes: int, expect: Layout | None) -> Layout:
    """Undo `write_layout`.

    Args:
        data: What it wrote.
        max_bytes: Most bytes of the tree as float32.
        expect: What it must be; None accepts any.

    Raises:
        MessageError: Damaged, foreign, too large or another layout.
    """
    if expect is not None and 4 * expect.size <= max_bytes and data == write_layout(expect):
        return expect  # to the byte what was asked for; what is known of it is found once for all messages
    table = read_table(tree_pb2.TensorTable, data, MAX_ROWS if expect is None else len(expect) + _SPARE)
    shapes: dict[Key, Shape] = {}
    total = 0
    for tensor in table.tensors:
        shape = tuple(tensor.shape[: _MAX_DIMS + 1])
        _require_shape(tensor.name, shape)
        total += math.prod(shape)
        shapes[Key.parse(tensor.name)] = shape
    _require_size(total, max_bytes)
    require_ascending([tensor.name for tensor in table.tensors], [Key.parse(t.name) for t in table.tensors])
    layout = Layout(shapes)
    if expect is None:
        return layout
    if layout != expect:
        raise _mismatch(layout, expect)
    return expect


def _require_shape(name: str, shape: Shape) -> None:
    if len(shape) > _MAX_DIMS or not all(1 <= n <= _MAX_DIM for n in shape):
        text = "x".join(map(str, shape))
        raise MessageError(
            f"shape {text} is outside the format",
            where=name[:80],
            mend=f"{_MAX_DIMS} dimensions, each 1 to {_MAX_DIM}.",
        )


def _require_size(numbers: int, max_bytes: int) -> None:
    if 4 * numbers > max_bytes:
        raise MessageError(
            f"a tree of {numbers} numbers takes {4 * numbers} bytes, the limit is {max_bytes}",
            mend="Raise wire.max_bytes if the sender is right.",
        )


def require_ascending(names: list[str], keys: list[Any]) -> None:
    """Refuse a table whose rows are not in order, or of which two are the same.

    Args:
        names: Of the rows, for errors.
        keys: What they are ordered by.

    Raises:
        MessageError: They are not in ascending order.
    """
    for name, before, after in zip(names[1:], keys, keys[1:], strict=False):
        if before >= after:
            what = "appears twice" if before == after else "is out of order"
            raise MessageError(f"the name {what}", where=name[:80], mend=FOREIGN)


def _mismatch(found: Layout, expect: Layout) -> MessageError:
    """Name the first tensor in which two layouts differ."""

    def differences() -> Iterator[tuple[Key, str]]:
        for key in sorted({*found, *expect}):
            if key not in expect:
                yield key, "nobody asked for this tensor"
            elif key not in found:
                yield key, "the tensor is missing"
            elif found[key] != expect[key]:
                yield key, f"shape {list(found[key])} where {list(expect[key])} was asked for"

    key, what = next(differences())
    return MessageError(what, where=key.name, mend="Sender and receiver must use the same plan.")
