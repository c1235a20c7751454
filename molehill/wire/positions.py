"""A sorted set of positions in few bytes: bit mask, byte gaps or Golomb-Rice, all vectorised."""

from __future__ import annotations

import struct
from collections.abc import Iterator
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
_BLOCK = 2**17  # positions that are decoded at a time


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


def decode(data: memoryview, count: int, size: int) -> NDArray[np.bool_]:
    """Undo `encode`. Gaps are undone block by block: beside ``[size]`` flags, memory is in proportion to the data.

    Args:
        data: What `encode` wrote.
        count: Positions there must be.
        size: Length of the mask.

    Returns:
        The mask, ``[size]``.

    Raises:
        MessageError: Damaged, or other than ``count`` positions below ``size``.
    """
    if len(data) == 0 or data[0] >= len(_WAYS):
        raise MessageError("unknown coding of positions")
    way, rest = _WAYS[data[0]], data[1:]
    if way == "mask":
        bits = np.unpackbits(np.frombuffer(expand_exactly(rest, -(-size // 8)), np.uint8))
        mask, found = bits[:size].view(np.bool_), int(np.count_nonzero(bits))
    else:
        mask, found, last = np.zeros(size, np.bool_), 0, -1
        for gaps in _ungap(rest, count, size) if way == "gap" else _ungolomb(rest, count, size):
            places = np.cumsum(gaps + 1) + last
            last, found = int(places[-1]), found + len(places)
            if last >= size:
                break
            mask[places] = True
    if found != count or np.count_nonzero(mask) != count:
        raise MessageError(f"positions are not {count} below {size}")
    return mask


def _gap(gaps: Ints) -> bytes:
    large = gaps[gaps >= _ESCAPE].astype("<u4")
    return compress(np.minimum(gaps, _ESCAPE).astype(np.uint8).tobytes() + large.tobytes())


def _ungap(data: memoryview, count: int, size: int) -> Iterator[Ints]:
    raw = expand(data, count + 4 * (size // _ESCAPE))  # every gap that is escaped passes over so many positions
    if len(raw) < count:
        raise MessageError(f"{len(raw)} gaps for {count} positions")
    short = np.frombuffer(raw, np.uint8, count)
    escaped = int(np.count_nonzero(short == _ESCAPE))
    require_length(len(raw), count + 4 * escaped)
    large, used = np.frombuffer(raw, "<u4", offset=count), 0
    for start in range(0, count, _BLOCK):
        gaps = short[start : start + _BLOCK].astype(np.int64)
        places = np.flatnonzero(gaps == _ESCAPE)
        gaps[places] = large[used : used + len(places)]
        used += len(places)
        yield gaps


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


def _ungolomb(data: memoryview, count: int, size: int) -> Iterator[Ints]:
    (bits,), rest = split_head(data, _GOLOMB)
    # What `_golomb` tries at most: the mean gap is below size / count.
    if bits > min(_MOST_BITS, (size // max(count, 1)).bit_length() + 1):
        raise MessageError(f"Golomb codes with {bits} bits for {count} positions below {size}")
    width = -(-count * bits // 8)
    if len(rest) < width:
        raise MessageError("Golomb-coded positions are cut short")
    # One bit ends each code; the gaps come to at most size - count together, and what is left of them to the rest.
    most = -(-(count + (max(size - count, 0) >> bits)) // 8)
    if len(rest) - width > most:
        raise MessageError(f"Golomb codes of {len(rest) - width} bytes, {count} below {size} take at most {most}")
    coded: Bytes = np.frombuffer(rest, np.uint8)
    low, unary = coded[:width], coded[width:]
    done, last = 0, -1  # codes so far, and the bit that ended the last one
    for start in range(0, len(unary), _BLOCK // 8):
        ends = np.flatnonzero(np.unpackbits(unary[start : start + _BLOCK // 8])) + 8 * start
        if done + len(ends) > count:
            raise MessageError(f"more Golomb codes than {count} positions")
        if len(ends):
            high = np.diff(ends, prepend=last) - 1
            last = int(ends[-1])
            yield (high << bits) + _remainders(low, done, len(ends), bits)
            done += len(ends)
    if done != count:
        raise MessageError(f"{done} Golomb codes for {count} positions")


def _remainders(low: Bytes, start: int, count: int, bits: int) -> Ints:
    """The remainders of some codes, ``[count]``; those of all lie side by side, each with its lowest bit first."""
    at, end = start * bits, (start + count) * bits
    flags = np.unpackbits(low[at // 8 : -(-end // 8)])[at % 8 :][: end - at].reshape(count, bits)
    total = np.zeros(count, np.int64)
    for bit in range(bits):
        total |= flags[:, bit].astype(np.int64) << bit
    return total
