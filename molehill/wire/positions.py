"""A sorted set of positions in few bytes: bit mask, byte gaps or Golomb-Rice, all vectorised."""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.errors import MessageError
from molehill.wire.packing import Bytes, Ints, compress, expand, expand_exactly, require_length, split_head

Way: TypeAlias = Literal["mask", "gap", "golomb"]

_ESCAPE = 255
_WAYS: tuple[Way, ...] = ("mask", "gap", "golomb")
_GOLOMB = struct.Struct("<B")  # bits of every remainder
_MOST_BITS = 31


def encode(mask: NDArray[np.bool_], way: Way | Literal["auto"]) -> bytes:
    """Encode the set positions of ``mask``; ``auto`` takes the shortest of all ways.

    The ways, for k of n positions (H = binary entropy): ``mask`` n bits and zstd, near n H(k/n) from about 1/5 on;
    ``gap`` one byte per position and zstd, cheap to decode when few are set; ``golomb`` a power-of-two Golomb code
    (Rice 1979) of the gaps, within 4 % of n H(k/n) for every k up to n/2.

    Args:
        mask: ``[n]``.
        way: How.

    Returns:
        One byte that names the way, then the positions.
    """
    gaps = np.diff(np.flatnonzero(mask), prepend=-1) - 1 if way != "mask" else np.zeros(0, np.int64)
    coded = {
        "mask": lambda: compress(np.packbits(mask).tobytes()),
        "gap": lambda: _gap(gaps),
        "golomb": lambda: _golomb(gaps),
    }
    ways = _WAYS if way == "auto" else (way,)
    return min((bytes([_WAYS.index(each)]) + coded[each]() for each in ways), key=len)


def decode(data: memoryview, count: int, size: int) -> Ints:
    """Undo `encode`.

    Args:
        data: What `encode` wrote.
        count: Positions there must be.
        size: Length of the mask.

    Returns:
        Ascending positions below ``size``, ``[count]``.

    Raises:
        MessageError: Damaged, or other than ``count`` positions below ``size``.
    """
    if len(data) == 0 or data[0] >= len(_WAYS):
        raise MessageError("unknown coding of positions")
    way, rest = _WAYS[data[0]], data[1:]
    if way == "mask":
        bits = np.unpackbits(np.frombuffer(expand_exactly(rest, -(-size // 8)), np.uint8))
        found = np.flatnonzero(bits)
    else:
        gaps = _ungap(rest, count) if way == "gap" else _ungolomb(rest, count, size)
        found = np.cumsum(gaps + 1) - 1
    if len(found) != count or (count and found[-1] >= size):
        raise MessageError(f"positions are not {count} below {size}")
    return found


def _gap(gaps: Ints) -> bytes:
    large = gaps[gaps >= _ESCAPE].astype("<u4")
    return compress(np.minimum(gaps, _ESCAPE).astype(np.uint8).tobytes() + large.tobytes())


def _ungap(data: memoryview, count: int) -> Ints:
    raw = expand(data, 5 * count)
    if len(raw) < count:
        raise MessageError(f"{len(raw)} gaps for {count} positions")
    gaps = np.frombuffer(raw, np.uint8, count).astype(np.int64)
    escaped = gaps == _ESCAPE
    require_length(len(raw), count + 4 * int(escaped.sum()))
    gaps[escaped] = np.frombuffer(raw, "<u4", offset=count)
    return gaps


def _golomb(gaps: Ints) -> bytes:
    # The best number of remainder bits lies beside log2 of the mean gap.
    near = int(np.log2(gaps.mean() + 1)) if len(gaps) else 0
    tried = range(max(near - 1, 0), min(near + 1, _MOST_BITS) + 1)
    bits = min(tried, key=lambda b: len(gaps) * b + int((gaps >> b).sum()))
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    low = (gaps[:, None] >> np.arange(bits)) & 1
    return _GOLOMB.pack(bits) + np.packbits(low.astype(np.uint8)).tobytes() + np.packbits(unary).tobytes()


def _ungolomb(data: memoryview, count: int, size: int) -> Ints:
    (bits,), rest = split_head(data, _GOLOMB)
    width = -(-count * bits // 8)
    if bits > _MOST_BITS or len(rest) < width:
        raise MessageError("Golomb-coded positions are cut short")
    # One bit ends each code; the gaps come to at most size - count together, and what is left of them to the rest.
    most = -(-(count + (max(size - count, 0) >> bits)) // 8)
    if len(rest) - width > most:
        raise MessageError(f"Golomb codes of {len(rest) - width} bytes, {count} below {size} take at most {most}")
    coded: Bytes = np.frombuffer(rest, np.uint8)
    low = np.unpackbits(coded[:width], count=count * bits).reshape(count, bits).astype(np.int64)
    ends = np.flatnonzero(np.unpackbits(coded[width:]))
    if len(ends) != count:
        raise MessageError(f"{len(ends)} Golomb codes for {count} positions")
    high = np.diff(ends, prepend=-1) - 1
    return np.asarray((high << bits) + (low << np.arange(bits)).sum(axis=1), np.int64)
